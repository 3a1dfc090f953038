"""The same with the SDK's own `MonaiBundleInferenceOperator` between two small operators of ours.

From inside the bundle:

    PYTHONPATH=. python docs/hosts/deploy/stock_app.py -i in -o out -m models/model_series.ts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, ConditionType, Fragment, IOType, Operator, OperatorSpec
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)
from operators import PairLoaderOperator

from equireg.images import write_image
from equireg.io import write_displacement_field
from equireg.pairs import read_pair
from equireg.preparation import PreparePaird, RestorePaird
from equireg.world import warp_image


class PrepareOperator(Operator):
    """Make the one tensor that the stock operator takes, and pass on what places its answer in the world.

    Named inputs:
        moving: as for `RegistrationOperator`.
        fixed: likewise.

    Named outputs:
        image: the stacked pair `(2, *shape)`, float32.
        pair: a list of one item, what `PreparePaird` returned.

    Args:
        fragment: the application.
        spacing: of the network, millimeters; see `PreparePaird`.
        background: value of the background of both images.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, spacing: float | None = None, background: float = 0.0, **kwargs: Any
    ) -> None:
        self.prepare = PreparePaird(spacing=spacing, background=background)
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare inputs and outputs."""
        for name in ("moving", "fixed"):
            spec.input(name)
        for name in ("image", "pair"):
            spec.output(name).condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Prepare the pair."""
        pair = self.prepare(read_pair({role: op_input.receive(role) for role in ("moving", "fixed")}))
        op_output.emit(pair["image"], "image")
        op_output.emit([pair], "pair")  # a bare dictionary of tensors would lose their affines on the way


class RestoreOperator(Operator):
    """Place the stock operator's answer in the world and write moved image and displacement field.

    Named inputs:
        pred: `(D + 1, *shape)`, an array: the ddf in voxels, then the moved image.
        pair: as `PrepareOperator` emits.

    Args:
        fragment: the application.
        output_folder: where the files go.
        background: value that the moved image has where the moving image ends.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, output_folder: Path, background: float = 0.0, **kwargs: Any
    ) -> None:
        self.output_folder, self.background = output_folder, background
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the inputs."""
        for name in ("pred", "pair"):
            spec.input(name)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the files."""
        pred = torch.from_numpy(op_input.receive("pred"))
        [pair] = op_input.receive("pair")
        item = RestorePaird()({**pair, "pred": pred})
        field = item["fixed_to_moving"]
        write_displacement_field(field, field.affine, self.output_folder / "fixed_to_moving.nii.gz")
        write_image(warp_image(item["moving"], field, background=self.background), self.output_folder / "moved.nii.gz")


class StockApp(Application):
    """Load a pair, make one tensor of it, infer with the stock operator, restore and write."""

    def compose(self) -> None:
        """Connect the operators."""
        context = Application.init_app_context(self.argv)
        loader = PairLoaderOperator(self, CountCondition(self, 1), input_folder=context.input_path, name="loader")
        options = self.kwargs("registration")
        space, background = options.get("spacing"), options.get("background", 0.0)
        prepare = PrepareOperator(self, spacing=space, background=background, name="prepare")
        inference = MonaiBundleInferenceOperator(
            self,
            app_context=context,
            input_mapping=[IOMapping("image", torch.Tensor, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", torch.Tensor, IOType.IN_MEMORY)],
            # The bundle's own transforms take two files; these names are not in its config, so nothing is done.
            bundle_config_names=BundleConfigNames(preproc_name="none", postproc_name="none"),
            name="inference",
        )
        restore = RestoreOperator(self, output_folder=context.output_path, background=background, name="restore")
        self.add_flow(loader, prepare, {("moving", "moving"), ("fixed", "fixed")})
        self.add_flow(prepare, inference, {("image", "image")})
        self.add_flow(inference, restore, {("pred", "pred")})
        self.add_flow(prepare, restore, {("pair", "pair")})


if __name__ == "__main__":
    app = StockApp()
    app.config(str(Path(__file__).with_name("app.yaml")))
    app.run()
