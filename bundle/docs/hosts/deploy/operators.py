"""MONAI Deploy operators around the package: find a pair, register it, write what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from monai.deploy.core import AppContext, ConditionType, Fragment, Image, Operator, OperatorSpec

from equireg.registration import Registrar
from equireg.results import save_registration
from equireg.weights import weights_record


class PairLoaderOperator(Operator):
    """Find the moving and the fixed image in a folder.

    Named outputs:
        moving: path of the one file or folder (a DICOM series) there whose name begins with "moving".
        fixed: likewise.

    Args:
        fragment: the application.
        input_folder: where the two are.
    """

    def __init__(self, fragment: Fragment, *args: Any, input_folder: str | Path, **kwargs: Any) -> None:
        self.input_folder = Path(input_folder)
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the outputs."""
        for role in ("moving", "fixed"):
            spec.output(role).condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Emit both paths.

        Raises:
            ValueError: if there is no such file or folder, or more than one.
        """
        for role in ("moving", "fixed"):
            found = sorted(self.input_folder.glob(f"{role}*"))
            if len(found) != 1:
                names = ", ".join(path.name for path in found) or "none"
                raise ValueError(f"expected one file or DICOM folder '{role}*' in {self.input_folder}, got {names}.")
            op_output.emit(found[0], role)


class RegistrationOperator(Operator):
    """Register a moving to a fixed image with the application's TorchScript model.

    Named inputs:
        moving: a path, or the SDK's `Image` of a DICOM series, or whatever else `equireg.images.read_image` takes.
        fixed: likewise.

    Named output:
        registration: `equireg.registration.Registration`: moved image, both transforms and a report, float32.

    Args:
        fragment: the application.
        app_context: holds the model, as `ckpt_export` wrote it.
        options: arguments of `equireg.registration.Registrar` but for the weights, such as `spacing`.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, app_context: AppContext, options: dict[str, Any], **kwargs: Any
    ) -> None:
        self.app_context = app_context
        self.options = options
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare inputs and output."""
        spec.input("moving")
        spec.input("fixed")
        spec.output("registration").condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Register the pair.

        Raises:
            ValueError: if the model is none of this bundle's, and as `equireg.register`.
        """
        moving, fixed = (readable(op_input.receive(role)) for role in ("moving", "fixed"))
        op_output.emit(self.registrar()(moving, fixed), "registration")

    def registrar(self) -> Registrar:
        """Return what registers with the network inside the exported `PairNetwork`."""
        model = self.app_context.models.get() if self.app_context.models else None
        network = getattr(model and model.predictor, "net", None)
        if network is None or not hasattr(network, "spatial_dims"):
            raise ValueError(
                f"expected a scripted network of this bundle, got the model '{self.app_context.model_path}'."
            )
        registrar = Registrar(network, **self.options)
        record = weights_record(model.path)
        registrar.options.update(weights=record["name"], weights_sha256=record["sha256"])
        return registrar


class RegistrationWriterOperator(Operator):
    """Write a registration as the command `equireg register` does: images, ITK displacement fields, a report.

    Named input:
        registration: see `RegistrationOperator`.

    Args:
        fragment: the application.
        output_folder: where the files go.
    """

    def __init__(self, fragment: Fragment, *args: Any, output_folder: str | Path, **kwargs: Any) -> None:
        self.output_folder = output_folder
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the input."""
        spec.input("registration")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the files."""
        save_registration(op_input.receive("registration"), self.output_folder)


def readable(source: Any) -> Any:
    """Turn the SDK's `Image`, axes (slice, row, column), into array (column, row, slice) and affine to RAS+ mm.

    Args:
        source: an `Image` that `DICOMSeriesToVolumeOperator` made; anything else is returned as it is.

    Returns:
        What `equireg.images.read_image` takes.

    Raises:
        ValueError: if pixels are not square: the SDK (4.0.0) multiplies the direction along a row by the distance
            between rows, and the other way round, so that its affine places such an image wrongly.
    """
    if not isinstance(source, Image):
        return source
    affine = np.asarray(source.metadata()["nifti_affine_transform"])
    across, down = np.linalg.norm(affine[:3, :2], axis=0)
    if not np.isclose(across, down, rtol=1e-4):
        raise ValueError(
            f"the SDK's affine is wrong for pixels that are not square, got {across:g} x {down:g} mm: pass the folder "
            "of the series instead."
        )
    return np.swapaxes(source.asnumpy(), 0, 2), affine
