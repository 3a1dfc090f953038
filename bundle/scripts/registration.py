"""Register two images in one call: files, arrays or `MetaTensor`s in; images, transforms and a report out."""

from __future__ import annotations

import copy
import difflib
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn

from .inferer import RegistrationInferer
from .landmarks import Landmarks
from .losses import LocalCorrelationLoss, MINDSSCLoss
from .networks import PairNetwork
from .optimization import FieldOptimization, NetworkOptimization
from .pairs import PAIR_KEYS, fingerprints, input_names, read_pair
from .preparation import PreparePaird, RestorePaird
from .report import describe, doubts_about_fit, measure, network_inconsistency, similarity
from .weights import load_network, weights_record
from .world import field_affine, invert_field, map_points, resample, warp_image

__all__ = ["METHODS", "SIMILARITIES", "Registrar", "Registration", "register"]

METHODS = ("field", "network")
SIMILARITIES = ("lncc", "mind")


@dataclass(frozen=True)
class Registration:
    """What registering a pair gives.

    Args:
        pair: what was read: `moving` and `fixed`, and labels, masks and landmarks that were given; see
            `equireg.pairs.read_pair`.
        moved: the moving image on the fixed image's grid, `(1, *fixed shape)`, in the moving image's intensities.
        fixed_to_moving: displacement field `(D, *fixed shape)`, from fixed to moving points, see `equireg.world`.
        moving_to_fixed: displacement field `(D, *moving shape)`, from moving to fixed points: the inverse.
        report: what was seen, done and measured; plain numbers, texts, lists and dictionaries.
        moved_label: the moving label map on the fixed grid, `(1, *fixed shape)`, if there was one.
        moved_points: the moving landmarks, brought into the fixed image, if there were some.
        fixed_points_in_moving: the fixed landmarks, brought into the moving image, if there were some.
    """

    pair: dict[str, Any] = field(repr=False)
    moved: MetaTensor = field(repr=False)
    fixed_to_moving: MetaTensor = field(repr=False)
    moving_to_fixed: MetaTensor = field(repr=False)
    report: dict[str, Any]
    moved_label: MetaTensor | None = field(default=None, repr=False)
    moved_points: Landmarks | None = field(default=None, repr=False)
    fixed_points_in_moving: Landmarks | None = field(default=None, repr=False)


def register(moving: Any, fixed: Any, **arguments: Any) -> Registration:
    """Register a moving to a fixed image, wherever and however the two lie in the world.

    Args:
        moving: the moving image: a file (NIfTI, NRRD, MetaImage, a folder of DICOM slices), a `MetaTensor`
            `(1, *moving shape)`, or an array and its affine; see `equireg.images.read_image`.
        fixed: the fixed image, likewise.
        arguments: how to register, see `Registrar`; and what goes with the images, see `equireg.pairs.read_pair`:
            `moving_label`, `fixed_label`, `moving_points`, `fixed_points`, `moving_mask`, `fixed_mask`,
            `similarity_mask`, `initial_transform`, `point_frame`.

    Returns:
        The moved image, both transforms, and a report.

    Raises:
        ValueError: naming what is wrong with an input or an option.
        FileNotFoundError: if there are no such weights.

    Example:
        >>> fixed = torch.zeros(1, 40, 40)
        >>> fixed[0, 10:30, 10:25] = torch.rand(20, 15)
        >>> image = MetaTensor(fixed, affine=torch.eye(4))
        >>> register(image, image, weights="vessels").fixed_to_moving.shape
        torch.Size([2, 40, 40])
    """
    parts = {name: value for name, value in arguments.items() if name not in Registrar.OPTIONS}
    unknown = [name for name in parts if name not in (*PAIR_KEYS, "point_frame")]
    if unknown:
        known = (*Registrar.OPTIONS, *PAIR_KEYS, "point_frame")
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ValueError(f"register has no argument '{unknown[0]}'{f', did you mean {near[0]}' if near else ''}.")
    options = {name: value for name, value in arguments.items() if name in Registrar.OPTIONS}
    return Registrar(**options)(moving, fixed, **parts)


class Registrar:
    """Register pairs with one network, which is loaded once and never changed.

    Args:
        weights: name of shipped weights, path of a weights file, or a network called `net(moving, fixed)`.
        device: where the network runs, such as "cpu" or "cuda".
        spacing: at which the network sees the images, millimeters, along each axis or along all. Left out, it is that
            of the weights' record, and where there is none that of the fixed image.
        optimize: steps of instance optimization after the network's answer; 0 is none.
        method: what is optimized: "field", the displacements, fast; or "network", a copy of the weights, as in the CARL
            paper.
        similarity: what is optimized and reported: "lncc", local correlation, for one modality; or "mind", the distance
            of MIND-SSC descriptors, for two.
        background: value of the background of both images, which the moved image has where the moving image ends.
        fixed_background: value of the background of the fixed image, if it has another one.
        progress: show a progress bar while optimizing.

    Raises:
        ValueError: for an option that is none of these; when called, as `register`.
        FileNotFoundError: if there are no such weights.
    """

    OPTIONS = (
        *("weights", "device", "spacing", "optimize", "method", "similarity"),
        *("background", "fixed_background", "progress"),
    )

    def __init__(
        self,
        weights: str | Path | nn.Module = "brain",
        *,
        device: str = "cpu",
        spacing: Sequence[float] | float | None = None,
        optimize: int = 0,
        method: str = "field",
        similarity: str = "lncc",
        background: float = 0.0,
        fixed_background: float | None = None,
        progress: bool = False,
    ) -> None:
        if method not in METHODS or similarity not in SIMILARITIES:
            raise ValueError(
                f"the method is {' or '.join(METHODS)} and the similarity {' or '.join(SIMILARITIES)}, got '{method}' "
                f"and '{similarity}'."
            )
        if not hasattr(optimize, "__index__") or isinstance(optimize, bool) or optimize < 0:
            raise ValueError(f"optimize is a number of steps, 0 or more, got {optimize!r}.")
        optimize = operator.index(optimize)
        backgrounds = (background, background if fixed_background is None else fixed_background)
        for value in backgrounds:
            if not (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max):
                raise ValueError(f"the background is a number, got {value!r}.")
        record: dict[str, Any] = {"name": type(weights).__name__}
        if isinstance(weights, nn.Module):
            network = copy.deepcopy(weights)  # its mode and device stay the caller's
        elif isinstance(weights, (str, Path)):
            record, network = weights_record(weights), load_network(weights)
        else:
            raise ValueError(f"weights are a name, a file or a network, got {weights!r}.")
        self.record = record
        self.device = _device(device)
        self.network = PairNetwork(network.to(self.device)).eval()
        self.spatial_dims = int(network.spatial_dims)  # type: ignore[arg-type]
        backgrounds = (float(backgrounds[0]), float(backgrounds[1]))
        self.background = backgrounds[0]
        self.similarity = LocalCorrelationLoss(sigma=2.0) if similarity == "lncc" else MINDSSCLoss(radius=1, dilation=1)
        spacing = record.get("spacing_mm") if spacing is None else spacing
        self.prepare = PreparePaird(spacing=spacing, background=backgrounds)
        self.optimization: Callable[..., torch.Tensor] | None = None
        if optimize:
            kind = FieldOptimization if method == "field" else NetworkOptimization
            self.optimization = kind(steps=optimize, similarity=self.similarity, progress=progress)
        self.options = {
            "weights": record["name"],
            "weights_sha256": record.get("sha256"),
            "device": str(self.device),
            "spacing_mm": spacing,
            "optimize": optimize,
            "method": method if optimize else None,
            "similarity": similarity,
            "background": list(backgrounds),
        }

    def __call__(self, moving: Any, fixed: Any, *, point_frame: str | None = None, **parts: Any) -> Registration:
        """Register a pair; see `register`."""
        sources = {"moving": moving, "fixed": fixed, **parts}
        states = fingerprints(sources)  # before anything is read
        seconds: dict[str, float] = {}
        with _timed(seconds, "total"):
            with _timed(seconds, "read"):
                pair = read_pair(sources, self.spatial_dims, point_frame)
            with _timed(seconds, "prepare"):
                seen = self.prepare(pair)
                counted = _counted(seen)
            with _timed(seconds, "network"):
                there = self._answer(seen["network_moving"], seen["network_fixed"])
                back = self._answer(seen["network_fixed"], seen["network_moving"])
            inconsistency = network_inconsistency(there, back, seen["network_fixed"])
            if self.optimization is not None:
                with _timed(seconds, "optimize"):
                    there = self._optimized(seen["network_moving"], seen["network_fixed"], there, counted)
            with _timed(seconds, "transforms"):
                fixed_to_moving = RestorePaird()({**seen, "pred": there})["fixed_to_moving"]
                grid = pair["moving"]
                moving_to_fixed = invert_field(fixed_to_moving, field_affine(grid), grid.shape[1:])
            with _timed(seconds, "warp"):
                moved = warp_image(pair["moving"], fixed_to_moving, background=self.background)
                label = pair.get("moving_label")
                moved_label = None if label is None else warp_image(label, fixed_to_moving, "nearest")
            with _timed(seconds, "measure"):
                measured = {
                    "similarity": similarity(seen, there, self.similarity, counted),
                    "network_inverse_consistency_mm": inconsistency,
                    **measure(pair, fixed_to_moving, moving_to_fixed, moved_label, self.prepare.backgrounds[1]),
                }
        report = {
            "inputs": input_names(sources),
            "input_states": states,
            **describe(seen, self.prepare.backgrounds),
            "options": {**self.options, "point_frame": point_frame},
            **measured,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        report["warnings"] += doubts_about_fit(report, self.record)
        return Registration(
            pair=pair,
            moved=moved,
            fixed_to_moving=fixed_to_moving,
            moving_to_fixed=moving_to_fixed,
            report=report,
            moved_label=moved_label,
            moved_points=_brought(pair.get("moving_points"), moving_to_fixed),
            fixed_points_in_moving=_brought(pair.get("fixed_points"), fixed_to_moving),
        )

    def _answer(self, moving: MetaTensor, fixed: MetaTensor) -> torch.Tensor:
        """Return the network's ddf `(D, *fixed shape)` between two network images, voxels."""
        inputs, target = (image.as_tensor()[None].to(self.device) for image in (moving, fixed))
        with torch.no_grad():
            pred = RegistrationInferer()(inputs, self.network, fixed=target)
        return pred[0, : self.spatial_dims].cpu()

    def _optimized(
        self, moving: MetaTensor, fixed: MetaTensor, ddf: torch.Tensor, counted: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the ddf `(D, *fixed shape)` after instance optimization, voxels."""
        given = [image.as_tensor()[None].to(self.device) for image in (moving, fixed)]
        weight = None if counted is None else counted[None].to(self.device)
        assert self.optimization is not None
        return self.optimization(self.network.net, *given, ddf[None].to(self.device), weight)[0].cpu()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block takes."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _device(name: str | torch.device) -> torch.device:
    """Return a device that is there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (TypeError, RuntimeError, AssertionError) as error:  # no name, unknown, no GPU
        raise ValueError(
            f"the device '{name}' cannot be used here: expected cpu, or cuda where there is a GPU."
        ) from error
    return device


def _counted(seen: Mapping[Any, Any]) -> torch.Tensor | None:
    """Return where similarity counts on the grid of the network's fixed image, `(1, *shape)`, if a mask says so."""
    if "similarity_mask" not in seen:
        return None
    fixed = seen["network_fixed"]
    given = seen["similarity_mask"].to(torch.uint8)
    mask = resample(given, field_affine(fixed), fixed.shape[1:], "nearest").as_tensor().float()
    mask = mask * (fixed.as_tensor() != 0).any(dim=0, keepdim=True)
    if not bool(mask.any()):
        raise ValueError("the similarity mask has no voxel in the content of the fixed image.")
    return mask


def _brought(landmarks: Landmarks | None, field: MetaTensor) -> Landmarks | None:
    """Take landmarks through a displacement field; they keep their names."""
    if landmarks is None:
        return None
    return Landmarks(map_points(landmarks.points_mm, [field]), landmarks.names)
