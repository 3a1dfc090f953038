"""What a registration reports: what was given, what the network saw of it, and what came out, measured.

A report is made of plain numbers, texts, lists and dictionaries, so that it can be written as JSON.
"""

from __future__ import annotations

import platform
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import monai
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import TransformBackends
from torch import nn

from . import __version__
from .blocks import blocks
from .evaluation import jsonable, landmark_error, overlap, regularity, round_trip
from .fields import compose
from .losses import LocalCorrelationLoss
from .preparation import restored_field
from .threads import in_threads
from .world import best_affine, field_affine, resample, warp_image

__all__ = [
    "ReportPaird",
    "describe",
    "doubts_about_fit",
    "measure",
    "network_inconsistency",
    "similarity",
    "software",
]

LOCAL_CORRELATION = "mean local correlation"  # of which more is better
_FOLDING = 1.0  # percent of cells from which on a field is in doubt
_INCONSISTENCY = (
    0.05  # of the extent of the content: answers in two directions that miss each other by more are in doubt
)
_EXTENT = 2.0  # times the extent that the weights were trained on, or its inverse


def describe(seen: Mapping[Any, Any], backgrounds: Sequence[float]) -> dict[str, Any]:
    """Say what was given, what the network saw of it, and what may be wrong with it.

    Args:
        seen: a pair after `equireg.preparation.PreparePaird`.
        backgrounds: value of the background in the moving and in the fixed image.

    Returns:
        "moving" and "fixed" with file, shape and spacing; "network" with the same of what it saw, and the share of its
        voxels that were content; "software", and "warnings", a list of sentences.
    """
    return {
        "moving": _image(seen["moving"]),
        "fixed": _image(seen["fixed"]),
        "network": {
            name: {**_image(seen[f"network_{name}"]), "content": _content(seen, name)} for name in ("moving", "fixed")
        },
        "software": software(),
        "warnings": [
            warning
            for name, background in zip(("moving", "fixed"), backgrounds)
            for warning in _doubts(seen[name], name, None if f"{name}_mask" in seen else background)
        ]
        + list(_unused(seen)),
    }


def doubts_about_fit(report: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Say what speaks against a registration; no doubt is no proof that it is right.

    Args:
        report: of the registration, with what `describe`, `similarity` and `measure` say, and with
            "network_inverse_consistency_mm" if both directions were asked for.
        record: of the weights, see `equireg.weights.weights_record`.

    Returns:
        A sentence for each doubt.
    """
    doubts = []
    seen = report["network"]["fixed"]
    extent = max(seen["shape"])
    trained = record.get("extent_voxels")
    if trained and not trained / _EXTENT <= extent <= trained * _EXTENT:
        wanted = max(n * step for n, step in zip(seen["shape"], seen["spacing_mm"])) / trained
        doubts.append(
            f"the content of the fixed image spans {extent} voxels of the network, which was trained on about "
            f"{trained}: a spacing of about {wanted:.2g} mm would suit, or other weights."
        )
    similarity = report["similarity"]
    better = similarity["after"] > similarity["before"]
    if better != (similarity["measure"] == LOCAL_CORRELATION):
        doubts.append("the images are less similar after registration than before.")
    if report["folding_percent"] > _FOLDING:
        doubts.append(f"the transform folds in {report['folding_percent']:.1f} % of its cells.")
    length = max(n * step for n, step in zip(seen["shape"], seen["spacing_mm"]))
    if report.get("network_inverse_consistency_mm", 0.0) > _INCONSISTENCY * length:
        doubts.append(
            f"the network's two answers, from fixed to moving points and back, miss each other by "
            f"{report['network_inverse_consistency_mm']:.3g} mm on average: it matched little."
        )
    return doubts


def software() -> dict[str, str]:
    """Return the versions on which a result depends, and what it ran on.

    Example:
        >>> sorted(software())
        ['equireg', 'machine', 'monai', 'python', 'torch']
    """
    return {
        "equireg": __version__,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def measure(
    pair: Mapping[Any, Any],
    fixed_to_moving: MetaTensor,
    moving_to_fixed: MetaTensor,
    moved_label: MetaTensor | None = None,
    background: float = 0.0,
) -> dict[str, Any]:
    """Measure a pair's transforms, and what labels and landmarks say of them.

    Args:
        pair: as `equireg.pairs.read_pair` returns it.
        fixed_to_moving: displacement field `(D, *fixed shape)`.
        moving_to_fixed: displacement field `(D, *moving shape)`.
        moved_label: the moving label map on the fixed grid, `(1, *fixed shape)`, if there is one.
        background: value of the background of the fixed image, unless the pair has a mask of it.

    Returns:
        Folding and smoothness over the whole fixed grid; inverse consistency, displacement and best-fitting affine over
        the content of the fixed image; and "overlap" and "landmarks" where the pair has both labels and both landmarks.
    """
    fixed = pair["fixed"]
    content = pair["fixed_mask"].as_tensor().bool() if "fixed_mask" in pair else fixed.as_tensor() != background
    measured: dict[str, Any] = {
        **regularity(fixed_to_moving),
        **round_trip(fixed_to_moving, moving_to_fixed, content),
        "displacement_mm": _lengths(fixed_to_moving, content),
        "best_affine": best_affine(fixed_to_moving, content).tolist(),
    }
    if moved_label is not None and "fixed_label" in pair:
        unmoved = resample(pair["moving_label"], field_affine(fixed), fixed.shape[1:], "nearest")
        before = overlap(unmoved, pair["fixed_label"])
        measured["overlap"] = {**overlap(moved_label, pair["fixed_label"]), "dice_before": before["dice"]}
    if "moving_points" in pair and "fixed_points" in pair:
        measured["landmarks"] = landmark_error(pair["fixed_points"], pair["moving_points"], [fixed_to_moving])
    return measured


def similarity(
    seen: Mapping[Any, Any], ddf: torch.Tensor, loss: nn.Module, weight: torch.Tensor | None = None
) -> dict[str, Any]:
    """Measure how similar two images are before and after registration, at the network's resolution.

    Args:
        seen: a pair after `equireg.preparation.PreparePaird`.
        ddf: `(D or more, *at least the shape of the network's fixed image)`, voxels.
        loss: `LocalCorrelationLoss` or `MINDSSCLoss`.
        weight: where similarity counts, `(1, *shape)`; the content of the fixed image if left out.

    Returns:
        The "measure" and its values "before" and "after". Of local correlation more is better, of MIND-SSC less.
    """
    moving, fixed = seen["network_moving"], seen["network_fixed"]
    if weight is None:
        weight = (fixed.as_tensor() != 0).any(dim=0, keepdim=True).float()
    local = isinstance(loss, LocalCorrelationLoss)
    pictures = {
        "before": resample(moving, field_affine(fixed), fixed.shape[1:]),
        "after": warp_image(moving, restored_field(ddf, moving, fixed)),
    }
    values: dict[str, Any] = {"measure": LOCAL_CORRELATION if local else "MIND-SSC distance"}
    for name, moved in pictures.items():
        value = loss(moved.as_tensor()[None], fixed.as_tensor()[None], weight[None]).item()
        values[name] = 1.0 - value if local else value
    return values


def network_inconsistency(there: torch.Tensor, back: torch.Tensor, fixed: MetaTensor) -> float:
    """Return by how much a network's two answers miss undoing each other: large where it matched nothing well.

    Args:
        there: ddf `(D, *fixed shape)`, voxels.
        back: ddf `(D, *moving shape)`, voxels of the same size.
        fixed: the fixed image as the network saw it, background 0.

    Returns:
        The mean over fixed content, millimeters.
    """
    dims = len(there)
    miss = compose(back[None].double(), there[None].double())[0]
    distance = torch.einsum("ij,j...->i...", field_affine(fixed)[:dims, :dims], miss).norm(dim=0)
    return distance[(fixed.as_tensor() != 0).any(dim=0)].mean().item()


class ReportPaird(Transform):
    """Say what was registered and measure it, for hosts that hand their users a dictionary of results.

    It follows `PreparePaird`, the network, `RestorePaird` and `InvertFieldd`, and what writes the transforms.

    Args:
        background: value of the background of the fixed image, or of the moving and of the fixed image.
        files: items with the path of a file to name in the report.
        output_key: where the report goes: plain numbers, texts, lists and dictionaries.

    Example:
        >>> from equireg.preparation import PreparePaird, RestorePaird
        >>> image = MetaTensor(torch.rand(1, 8, 9) + 0.1, affine=torch.eye(4))
        >>> item = PreparePaird()({"moving": image, "fixed": image})
        >>> item = RestorePaird()({**item, "pred": torch.zeros(2, 8, 9)})
        >>> item["moving_to_fixed"] = item["fixed_to_moving"]
        >>> ReportPaird()(item)["result"]["folding_percent"]
        0.0
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        background: float | Sequence[float] = 0.0,
        files: Sequence[str] = ("fixed_to_moving_path", "moving_to_fixed_path"),
        output_key: str = "result",
    ) -> None:
        self.backgrounds = [background] * 2 if isinstance(background, (int, float)) else list(background)
        self.files, self.output_key = tuple(files), output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the report added."""
        there, back = data["fixed_to_moving"], data["moving_to_fixed"]
        report = {
            **describe(data, self.backgrounds),
            "similarity": similarity(data, data["pred"], LocalCorrelationLoss(sigma=2.0)),
            **measure(data, there, back, background=self.backgrounds[1]),
            "files": {name.removesuffix("_path"): data[name] for name in self.files if name in data},
        }
        report["warnings"] += doubts_about_fit(report, {})
        return {**data, self.output_key: jsonable(report)}


def _lengths(field: MetaTensor, content: torch.Tensor) -> dict[str, float]:
    """Return mean and maximum of the displacements of the voxels of a mask `(1, *shape)`, millimeters."""
    dims = field.dim() - 1
    steps, ddf = field_affine(field)[:dims, :dims].float(), field.as_tensor()

    def part(where: tuple[slice, ...]) -> tuple[float, float]:
        length = torch.einsum("ij,jn->in", steps, ddf[where][:, content[where][0]]).square().sum(dim=0).sqrt()
        return (length.sum().item(), length.max().item()) if len(length) else (0.0, 0.0)

    totals, longest = zip(*in_threads(part, blocks(field.shape[1:])))
    return {"mean": sum(totals) / int(content.count_nonzero()), "max": max(longest)}


def _image(image: MetaTensor) -> dict[str, Any]:
    dims = image.dim() - 1
    name = image.meta.get("filename_or_obj")
    spacing = field_affine(image)[:dims, :dims].norm(dim=0).tolist()
    described = {"shape": list(image.shape[1:]), "spacing_mm": [round(step, 6) for step in spacing]}
    return described if name is None else {"file": str(name), **described}


def _content(seen: Mapping[Any, Any], name: str) -> float:
    """Return which share of what the network saw was content."""
    return round((seen[f"network_{name}"].as_tensor() != 0).any(dim=0).float().mean().item(), 4)


def _unused(seen: Mapping[Any, Any]) -> Iterator[str]:
    """Say what was given in vain."""
    if "fixed_label" in seen and "moving_label" not in seen:
        yield "there is a fixed label but no moving one: no overlap was measured."


def _doubts(image: MetaTensor, name: str, background: float | None) -> Iterator[str]:
    """Say what looks wrong with an image; its background is None where a mask says what it shows."""
    if image.meta.get("unplaced"):
        yield (
            f"the {name} image does not say where it lies (sform and qform codes are 0): other programs may place it "
            "elsewhere than this one, and transforms with it; set one of the codes."
        )
    if background is None:
        return
    below = (image < background).count_nonzero()
    if below > 0.01 * image.numel():  # a few dark voxels are no background
        lowest = image.min().item()
        common = bool((image == lowest).count_nonzero() > 0.01 * image.numel())
        advice = f"if {lowest:g} is its background, say so" if common else "if its background has another value, say so"
        yield (
            f"the {name} image has values below its background ({background:g}), down to {lowest:g}: {advice} "
            "(--background), or give a mask; air in CT is about -1024."
        )
