"""Compare registration methods on pairs of labeled images: hippocampi, or whole brains.

Every method registers the same arrays, the project's own test pairs, normalized and padded to one canvas of isotropic
voxels, and answers with the same thing, a ddf. That field moves the labels by nearest neighbor, so nothing but the
field differs between methods. For example

    python bundle/docs/results/compare.py hippocampus --dataset_dir Task04_Hippocampus --methods unregistered,equireg

prints a table and writes `hippocampus_<split>.csv`, a row per pair and method, and `.json`, the summary. The classical
methods need antspyx 0.6.3, picsl-greedy 1.4.0.3 with SimpleITK, itk-elastix 0.25.4 and convexadam 0.2.0, which the
project itself does not depend on.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, ResizeWithPadOrCropd, Rotated
from torch.nn.functional import pad

import equireg
from equireg.data import PairDataset
from equireg.fields import warp
from equireg.inferer import RegistrationInferer
from equireg.lists import decathlon_subjects, image_files
from equireg.losses import LocalCorrelationLoss, MINDSSCLoss
from equireg.metrics import folding_fraction
from equireg.networks import PairNetwork
from equireg.optimization import FieldOptimization
from equireg.transforms import NormalizeContentd

PAIR_SEEDS = {"training": 0, "validation": 1000003, "test": 2000003}  # the draws of the bundle's configs
PAIR_KEYS = ("moving", "fixed", "moving_label", "fixed_label")
ANTS_TYPES = {"ants_affine": "SyN", "ants": "SyNOnly"}  # affine then SyN, and SyN alone from the identity
# The network alone, the same in half precision, and with optimization of the field by two similarities.
NETWORKS: dict[str, tuple[Callable[..., torch.Tensor] | None, str]] = {
    "equireg": (None, ""),
    "equireg_bfloat16": (None, "bfloat16"),
    "equireg_lncc": (LocalCorrelationLoss(sigma=2.0), ""),
    "equireg_mind": (MINDSSCLoss(radius=1, dilation=1), ""),
}
ELASTIX_STEPS = ("affine", "bspline")  # its own default parameters, but for the spacing of the control points
ELASTIX_SPACING = 6.0  # voxels, at the end
GREEDY_STEPS = (
    "-i fixed moving -a -ia-image-centers -m NCC 2x2x2 -n 100x50x10 -seed 1 -o affine",
    "-i fixed moving -it affine -m NCC 2x2x2 -n 100x50x20 -seed 1 -o warp",
)


def _brains(dataset_dir: str | Path, split: str) -> list[dict[str, str]]:
    """List brains that no network is trained on: 5 for choices, 10 for the test."""
    files = image_files(dataset_dir, ["images/*.nii.gz"], r"(\d+)\.nii", split, fractions=(0.0, 1 / 3))
    return [{"image": f["image"], "label": f["image"].replace("/images/", "/labels/")} for f in files]


@dataclass(frozen=True)
class Images:
    """A set of labeled images.

    Args:
        title: of the data.
        canvas: what every image is padded or cropped to, voxels.
        subjects: lists the images of a folder and a split.
        regions: labels that have a column of their own.
        surrounded: whether an image shows more than what is labeled, so that it can be cropped and keep all labels.
    """

    title: str
    canvas: tuple[int, int, int]
    subjects: Callable[[str | Path, str], list[dict[str, str]]]
    regions: Mapping[str, int]
    surrounded: bool


DATA = {
    "hippocampus": Images(
        "Medical Segmentation Decathlon, Task04_Hippocampus",
        (48, 64, 48),
        decathlon_subjects,
        {"dice_anterior": 1, "dice_posterior": 2},
        surrounded=True,
    ),
    "brain": Images("OASIS brains of the MICCAI 2012 challenge, 2 mm", (80, 96, 80), _brains, {}, surrounded=False),
}

# Takes moving and fixed, both (1, 1, *canvas), and returns a function that gives the ddf (1, 3, *canvas), voxels.
# Only the first call is timed: the second may have to read the result from a file.
Registration = Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]


def _need(module: str, package: str) -> Any:
    """Import an optional module, or say which package has it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"This comparison needs the module '{module}': pip install {package}") from error


def _unregistered(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Leave the moving image where it is."""
    return lambda: torch.zeros(1, 3, *fixed.shape[2:])


def _network(
    weights: str, steps: int, similarity: Callable[..., torch.Tensor] | None = None, autocast: str = ""
) -> Registration:
    """Run the network, no alignment before it; after it steps of optimization, if a similarity is given."""
    optimization = None if similarity is None else FieldOptimization(steps=steps, similarity=similarity)
    net = PairNetwork(equireg.load_network(weights), autocast=autocast).eval()
    infer = RegistrationInferer(optimization=optimization)

    @torch.no_grad()
    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        ddf = infer(moving, net, fixed=fixed)[:, :3]
        return lambda: ddf

    return register


def _ants(kind: str) -> Registration:
    """Run ANTs with all its defaults; arrays get unit spacing and no rotation, so its millimeters are voxels."""
    ants = _need("ants", "antspyx==0.6.3")

    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        folder = tempfile.TemporaryDirectory()
        images = ants.from_numpy(fixed[0, 0].numpy()), ants.from_numpy(moving[0, 0].numpy())
        result = ants.registration(*images, type_of_transform=kind, outprefix=f"{folder.name}/")

        def field() -> torch.Tensor:
            with folder:
                path = ants.apply_transforms(*images, result["fwdtransforms"], compose=f"{folder.name}/all_")
                composed = ants.image_read(path).numpy()  # (*canvas, 3)
            return torch.from_numpy(np.moveaxis(composed, -1, 0).copy()).float().unsqueeze(0)

        return field

    return register


def _greedy(threads: int) -> Registration:
    """Run Greedy, affine and then deformable; here, too, millimeters are voxels."""
    greedy, sitk = _need("picsl_greedy", "picsl-greedy==1.4.0.3"), _need("SimpleITK", "SimpleITK")

    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        # SimpleITK reverses the axes of an array; reversing them before makes its axis i array axis i.
        pair = {"moving": moving, "fixed": fixed}
        images = {name: sitk.GetImageFromArray(image[0, 0].numpy().T) for name, image in pair.items()}
        tool, options = greedy.Greedy3D(), f"-threads {threads} -V 0"
        tool.execute(f"{GREEDY_STEPS[0]} {options}", out=io.StringIO(), **images, affine=None)
        tool.execute(f"{GREEDY_STEPS[1]} {options}", out=io.StringIO(), **images, warp=None)

        def field() -> torch.Tensor:
            tool.execute("-rf fixed -r warp affine -rc composed -V 0", composed=None)
            composed = sitk.GetArrayFromImage(tool["composed"])  # (*reversed canvas, 3)
            return torch.from_numpy(composed.transpose(3, 2, 1, 0).copy()).float().unsqueeze(0)

        return field

    return register


def _elastix(threads: int) -> Registration:
    """Run elastix, affine and then B-splines, on arrays of unit spacing."""
    itk = _need("itk", "itk-elastix==0.25.4")

    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        # ITK reverses the axes of an array, too.
        images = [itk.image_from_array(image[0, 0].numpy().T.copy()) for image in (fixed, moving)]
        parameters = itk.ParameterObject.New()
        for step in ELASTIX_STEPS:
            parameters.AddParameterMap(parameters.GetDefaultParameterMap(step, 4, ELASTIX_SPACING))
        found = itk.elastix_registration_method(
            *images, parameter_object=parameters, log_to_console=False, number_of_threads=threads
        )[1]

        def field() -> torch.Tensor:
            with tempfile.TemporaryDirectory() as folder:  # it writes a copy of the field, by default where one stands
                ddf = itk.transformix_deformation_field(images[1], found, log_to_console=False, output_directory=folder)
                composed = itk.array_from_image(ddf)
            return torch.from_numpy(composed.transpose(3, 2, 1, 0).copy()).float().unsqueeze(0)

        return field

    return register


def _convexadam() -> Registration:
    """Run ConvexAdam on MIND features with all its defaults."""
    convexadam, block = _need("convexAdam.convex_adam_MIND", "convexadam==0.2.0"), 6

    def register(moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[], torch.Tensor]:
        # Its coarse field is stretched where blocks of its first grid do not fill the canvas.
        room = [n for size in reversed(fixed.shape[2:]) for n in (0, -size % block)]
        images = [pad(image, room)[0, 0] for image in (fixed, moving)]
        with contextlib.redirect_stdout(io.StringIO()):  # it says that a CPU has no half precision
            field = convexadam.convex_adam_pt(*images, device=torch.device("cpu"))  # (*canvas, 3)
        ddf = torch.from_numpy(np.moveaxis(field, -1, 0).copy()).float().unsqueeze(0)
        return lambda: ddf[(..., *(slice(size) for size in fixed.shape[2:]))]

    return register


def registration(method: str, weights: str, threads: int, steps: int = 50) -> Registration:
    """Prepare a method by its name; `ValueError` for an unknown one, `ImportError` if a package is missing."""
    if method == "unregistered":
        return _unregistered
    if method in NETWORKS:
        return _network(weights, steps, *NETWORKS[method])
    if method == "greedy":
        return _greedy(threads)
    if method in ANTS_TYPES:
        return _ants(ANTS_TYPES[method])
    if method == "elastix":
        return _elastix(threads)
    if method == "convexadam":
        return _convexadam()
    known = ("unregistered", *NETWORKS, *ANTS_TYPES, "greedy", "elastix", "convexadam")
    raise ValueError(f"expected a method of {', '.join(known)}, got '{method}'.")


def pairs(data: Images, dataset_dir: str | Path, split: str, num_pairs: int) -> PairDataset:
    """Return the project's own pairs of a split, prepared as its configs prepare them."""
    keys = ["image", "label"]
    oriented = [LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS", labels=None)]
    load = Compose([*oriented, NormalizeContentd("image")])
    fit = ResizeWithPadOrCropd(PAIR_KEYS, data.canvas)
    return PairDataset(data.subjects(dataset_dir, split), load, fit, num_pairs=num_pairs, seed=PAIR_SEEDS[split])


def common_labels(data: Images, dataset_dir: str | Path) -> list[int]:
    """Return the labels that every subject of all splits has, without background."""
    subjects = [subject for split in PAIR_SEEDS for subject in data.subjects(dataset_dir, split)]
    found = [set(np.unique(np.asarray(nib.load(subject["label"]).dataobj)).astype(int)) for subject in subjects]
    return sorted(set.intersection(*found) - {0})


def label_dice(moved: torch.Tensor, fixed: torch.Tensor, labels: Sequence[int]) -> dict[int, float]:
    """Return the Dice overlap of each label, from counts: a mask for each of 132 would not be quick."""
    moved, fixed = moved.flatten().long(), fixed.flatten().long()
    size = 1 + max(int(moved.max()), int(fixed.max()), *labels)
    both, one, other = (torch.bincount(x, minlength=size) for x in (moved[moved == fixed], moved, fixed))
    return {label: float(2 * both[label] / (one[label] + other[label])) for label in labels}


def shifted(item: Mapping[str, Any], shift: int) -> dict[str, torch.Tensor]:
    """Move the moving image and label along the first axis, on a canvas longer by `|shift|` voxels at both its ends.

    Args:
        item: `PAIR_KEYS`, each `(1, *canvas)`.
        shift: voxels.

    Returns:
        The same keys as plain tensors `(1, 1, *longer canvas)`.
    """
    offsets = {key: shift if key.startswith("moving") else 0 for key in PAIR_KEYS}
    ends = {key: (abs(shift) + offset, abs(shift) - offset) for key, offset in offsets.items()}
    return {key: pad(torch.as_tensor(np.asarray(item[key]))[None], (0, 0, 0, 0, *ends[key])) for key in PAIR_KEYS}


def turned(item: Mapping[str, Any], degrees: float) -> dict[str, Any]:
    """Turn the moving image and label about the third axis, on a canvas that holds the turned corners too.

    Args:
        item: `PAIR_KEYS`, each `(1, *canvas)`.
        degrees: angle.

    Returns:
        The same keys, each `(1, *larger canvas)`, centers where they were.
    """
    if degrees == 0:
        return dict(item)
    first, second, third = item["moving"].shape[1:]
    side = 2 * math.ceil(math.hypot(first, second) / 2)
    room: Any = ResizeWithPadOrCropd(PAIR_KEYS, (side, side, third))
    turn: Any = Rotated(
        PAIR_KEYS[0::2], (0.0, 0.0, math.radians(degrees)), mode=("bilinear", "nearest"), padding_mode="zeros"
    )
    answer: dict[str, Any] = turn(room(dict(item)))
    return answer


def cropped(item: Mapping[str, Any], fraction: float, side: str, seed: int, keep: bool = True) -> dict[str, Any]:
    """Empty one image and its label outside a random box.

    Args:
        item: `PAIR_KEYS`, each `(1, *canvas)`.
        fraction: side lengths of the box over those of the image's content.
        side: "moving" or "fixed".
        seed: of the place of the box.
        keep: have the box hold all labels, larger where they need it.

    Returns:
        The same keys, those of one side changed.
    """
    if fraction >= 1:
        return dict(item)
    image, labels = np.asarray(item[side]), np.asarray(item[f"{side}_label"])
    box, generator, where = np.zeros_like(image), np.random.default_rng([seed, 7]), [slice(None)]
    held, all_there = np.argwhere(labels[0]), np.argwhere((image[0] != 0) | (labels[0] != 0))
    for axis in range(3):
        start, stop = all_there[:, axis].min(), all_there[:, axis].max() + 1
        least, most = (held[:, axis].min(), held[:, axis].max() + 1) if keep else (stop, start)
        size = max(most - least, round(fraction * (stop - start)))
        first = int(generator.integers(max(start, most - size), min(least, stop - size) + 1))
        where.append(slice(first, first + size))
    box[tuple(where)] = 1
    return {**item, side: torch.as_tensor(image * box), f"{side}_label": torch.as_tensor(labels * box)}


def whole(labels: Sequence[int], before: Mapping[str, Any], after: Mapping[str, Any], side: str) -> list[int]:
    """Return those labels of which one side of a pair, `(1, *canvas)`, has lost nothing."""
    counts = (
        np.bincount(np.asarray(item[f"{side}_label"]).astype(int).ravel(), minlength=max(labels) + 1)
        for item in (before, after)
    )
    same = np.equal(*counts)
    kept = [label for label in labels if same[label]]
    if not kept:
        raise ValueError(f"expected a crop that leaves a label whole, got one that cuts all {len(labels)}.")
    return kept


def measure(
    register: Registration, images: Mapping[str, torch.Tensor], labels: Sequence[int], regions: Mapping[str, int]
) -> dict[str, float]:
    """Register one pair; return Dice of each region, the mean of all labels, the share of folded cells, and seconds."""
    start = time.perf_counter()
    answer = register(images["moving"], images["fixed"])
    seconds = time.perf_counter() - start
    ddf = answer()
    moved = warp(images["moving_label"], ddf, mode="nearest", padding="zeros")
    dice = label_dice(moved, images["fixed_label"], labels)
    named = {name: dice[label] for name, label in regions.items()}
    return {
        **named,
        "dice": float(np.mean(list(dice.values()))),
        "folding": folding_fraction(ddf).item(),
        "seconds": seconds,
    }


def summarize(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each method the mean and standard deviation over pairs of every measure, and the median seconds."""
    summary: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        values = {
            key: np.array([row[key] for row in rows if row["method"] == method]) for key in (*measures, "seconds")
        }
        summary[method] = {f"{key}_mean": float(values[key].mean()) for key in measures}
        summary[method] |= {f"{key}_sd": float(values[key].std(ddof=1)) for key in measures}
        summary[method]["seconds_median"] = float(np.median(values["seconds"]))
    return summary


def table(summary: Mapping[str, Mapping[str, float]], measures: Sequence[str]) -> str:
    """Return the summary as a Markdown table."""
    overlaps = [name for name in measures if name != "folding"]
    titles = ["method", *(name.replace("dice_", "Dice ").replace("dice", "mean Dice") for name in overlaps)]
    lines = [f"| {' | '.join([*titles, 'folded', 'seconds'])} |", "|---" * (len(titles) + 2) + "|"]
    for method, row in summary.items():
        dice = [f"{row[f'{key}_mean']:.3f} ± {row[f'{key}_sd']:.3f}" for key in overlaps]
        cells = [method, *dice, f"{row['folding_mean']:.3%}", f"{row['seconds_median']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def provenance(threads: int) -> dict[str, Any]:
    """Return the machine and the versions of the packages, of those installed, on which the numbers depend."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    cpu = (models or [platform.processor() or platform.machine()])[0]
    installed = {str(entry.metadata["Name"]).lower().replace("_", "-"): entry.version for entry in distributions()}
    packages = ("equireg", "torch", "monai", "antspyx", "picsl-greedy", "simpleitk", "itk-elastix", "convexadam")
    versions = {name: installed[name] for name in packages if name in installed}
    return {"machine": f"{cpu}, {os.cpu_count()} cores, threads per method: {threads}", "versions": versions}


def main(
    data: str,
    dataset_dir: str,
    methods: str | Sequence[str] = ("unregistered", "equireg", "ants_affine", "ants", "greedy"),
    weights: str = "",
    num_pairs: int = 50,
    split: str = "test",
    shift: int = 0,
    turn: float = 0,
    crop: float = 1,
    crop_side: str = "moving",
    threads: int = 1,
    steps: int = 50,
    output_dir: str = "output",
) -> None:
    """Register pairs of images with several methods; print a table, write a CSV and a JSON file.

    Args:
        data: hippocampus or brain.
        dataset_dir: its folder: Task04_Hippocampus with its `dataset.json`, or brains in `images` and `labels`.
        methods: names separated by commas: unregistered, equireg, equireg_lncc, equireg_mind, ants_affine,
            ants, greedy, elastix, convexadam.
        weights: name of shipped weights or path of a weights file, for equireg; those named as the data if left out.
        num_pairs: how many ordered pairs of different subjects, of those of the split.
        split: "training", "validation" or "test".
        shift: move the moving image and its label by so many voxels along the first axis, on a longer canvas.
        turn: turn the moving image and its label by so many degrees about the third axis.
        crop: empty one image outside a random box of this fraction of its sides. It holds all labels of a hippocampus;
            labels of a brain that it cuts are not scored.
        crop_side: which one, moving or fixed.
        threads: threads of every method.
        steps: of optimization, for equireg_lncc and equireg_mind.
        output_dir: where the files go.
    """
    if data not in DATA:
        raise ValueError(f"expected data of {', '.join(DATA)}, got '{data}'.")
    if crop_side not in ("moving", "fixed"):
        raise ValueError(f"crop_side is moving or fixed, got '{crop_side}'.")
    weights = weights or data
    torch.set_num_threads(threads)
    # Both are read when the libraries start, so they are set before the first of them is imported.
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    os.environ.setdefault("ANTS_RANDOM_SEED", "1")
    tqdm = _need("tqdm", "tqdm").tqdm
    names = methods.replace(" ", "").split(",") if isinstance(methods, str) else list(methods)
    registers = {name: registration(name, weights, threads, steps) for name in names}
    dataset, regions = pairs(DATA[data], dataset_dir, split, num_pairs), DATA[data].regions
    labels, measures = common_labels(DATA[data], dataset_dir), (*regions, "dice", "folding")

    def moved(item: Mapping[str, Any], number: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        part = cropped(item, crop, crop_side, number, DATA[data].surrounded)
        return shifted(turned(part, turn), shift), whole(labels, item, part, crop_side)

    first = moved(dataset[0], 0)
    for register in registers.values():  # the first call of a library is slower than the others
        measure(register, *first, regions)

    moves = {"shift": (shift, 0), "turn": (turn, 0), f"crop_{crop_side}": (crop, 1)}
    suffix = "".join(f"_{name}{value:g}" for name, (value, still) in moves.items() if value != still)
    folder, name = Path(output_dir), f"{data}_{split}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    counts: list[int] = []
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ("pair", "moving", "fixed", "method", *measures, "seconds"))
        writer.writeheader()
        for number in tqdm(range(len(dataset)), desc="pairs"):
            item = dataset[number]
            subjects = {k: Path(item[k].meta["filename_or_obj"]).name.split(".")[0] for k in ("moving", "fixed")}
            images, scored = moved(item, number)
            counts.append(len(scored))
            for method, register in registers.items():
                rows.append(
                    {"pair": number, **subjects, "method": method, **measure(register, images, scored, regions)}
                )
                writer.writerow(rows[-1])
            stream.flush()
    summary = summarize(rows, measures)
    report = {
        "data": f"{DATA[data].title}, {len(dataset)} pairs of the {split} split, {len(labels)} labels",
        "labels_scored_mean": float(np.mean(counts)),
        **{name: value for name, (value, _) in moves.items()},
        "settings": {
            "equireg": Path(weights).name,
            "steps": steps,
            **ANTS_TYPES,
            "greedy": GREEDY_STEPS,
            "elastix": {"steps": ELASTIX_STEPS, "spacing": ELASTIX_SPACING},
        },
        **provenance(threads),
        "summary": summary,
    }
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(summary, measures))


if __name__ == "__main__":
    fire.Fire(main)
