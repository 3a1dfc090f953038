"""The command `equireg`: register, warp, evaluate, batch, compose, invert, affine, equivariance.

Everything heavy is imported inside the commands, so that help is instant. Options are given as `--name value`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from monai.data import MetaTensor

    from .registration import Registrar

__all__ = ["main"]

# Options of `register` that `batch` and `evaluate` take, too; `Registrar.OPTIONS` without what only a call can give.
_OPTIONS = (
    *("weights", "device", "spacing", "optimize", "method", "similarity", "background", "fixed_background"),
    "point_frame",
)
_TEXT_OPTIONS = ("weights", "device", "method", "similarity", "point_frame")


def register(
    *,
    moving: str,
    fixed: str,
    output: str,
    weights: str = "brain",
    device: str = "cpu",
    spacing: float | None = None,
    optimize: int = 0,
    method: str = "field",
    similarity: str = "lncc",
    moving_label: str = "",
    fixed_label: str = "",
    moving_points: str = "",
    fixed_points: str = "",
    point_frame: str = "",
    moving_mask: str = "",
    fixed_mask: str = "",
    similarity_mask: str = "",
    initial_transform: str = "",
    background: float = 0.0,
    fixed_background: float | None = None,
    exports: str = "",
    picture: bool = True,
) -> None:
    """Register a moving image to a fixed one, wherever the two lie; no alignment before is needed.

    Writes into the output folder: moved.nii.gz on the grid of the fixed image; fixed_to_moving.nii.gz and
    moving_to_fixed.nii.gz, displacement fields that ITK, SimpleITK and ANTs read; qc.png, to see at once whether it
    worked; report.json, with all that was seen and measured; and moved labels and points if there are some.

    Args:
        moving: the image to be moved (NIfTI, NRRD, MetaImage, PNG, or a folder with a DICOM series).
        fixed: the image to register to.
        output: folder for the results, made if missing.
        weights: trained for what the images show: a name, such as brain (3D MR without skull, turned by any angle; if
            left out), hippocampus (3D MR crops) or vessels (2D retina), or the path of a file that training wrote.
        device: where the network runs: cpu or cuda.
        spacing: at which the network sees the images, millimeters, one number or one for each axis (1,1,2); that of the
            weights if left out. For vessels choose it so that the retina spans about 100 voxels.
        optimize: steps of instance optimization after the network's answer, such as 50: better and slower.
        method: what is optimized: field (fast) or network (a copy of the weights, as in the CARL paper).
        similarity: what is optimized and reported: lncc (one modality) or mind (two modalities).
        moving_label: label map on the moving image's grid, to be moved along.
        fixed_label: label map on the fixed image's grid, to measure overlap.
        moving_points: landmarks in the moving image (.csv, .fcsv, .mrk.json, elastix or DIR-Lab .txt), to be brought to
            the fixed image.
        fixed_points: landmarks in the fixed image, to be brought to the moving image; with both, their distance is
            measured.
        point_frame: what numbers in .csv files of landmarks are: ras (if left out), lps or voxel.
        moving_mask: nonzero where the object is in the moving image; the network sees nothing else.
        fixed_mask: the same in the fixed image.
        similarity_mask: nonzero where, in the fixed image, similarity is measured and optimized.
        initial_transform: ITK affine (.tfm, .mat, .h5) from fixed to moving points to start from.
        background: value of the background of the images, such as -1024 in CT; the moved image has it where the moving
            image ends.
        fixed_background: value of the background of the fixed image, if it has another one.
        exports: more files, separated by commas: h5 (ITK composite transforms), affine (the best-fitting affine part)
            and learn2reg (displacement in voxels).
        picture: --nopicture leaves out qc.png.

    Example:
        equireg register --moving moving.nii.gz --fixed fixed.nii.gz --output registered
    """
    arguments = {name: value for name, value in locals().items() if value not in ("", None)}
    from .pairs import PAIR_KEYS
    from .results import check_results, save_registration

    check_results(output, _listed(exports))  # what cannot be written at the end is better known now
    registrar = _registrar(arguments)
    parts = {key: arguments[key] for key in PAIR_KEYS if key in arguments}
    result = registrar(**parts, point_frame=point_frame.lower() or None)
    files = save_registration(result, output, _listed(exports), picture)
    report = result.report
    print(f"{', '.join(path.name for path in files.values())} in {output}")
    print(_headline(report))
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def warp(
    *,
    transform: str,
    output: str,
    image: str = "",
    reference: str = "",
    interpolation: str = "linear",
    background: float = 0.0,
    points: str = "",
    point_frame: str = "",
    points_image: str = "",
    output_image: str = "",
    style: str = "",
) -> None:
    """Apply transforms to an image or to landmarks, whichever program wrote them.

    An image is resampled onto a reference grid: its transform takes points of the reference to points of the image, as
    fixed_to_moving does for the moving image. Landmarks go the way of their transform: fixed ones through
    fixed_to_moving, moving ones through moving_to_fixed.

    Args:
        transform: displacement field (.nii.gz, .nrrd, .mha) or ITK transform (.h5, .tfm, .mat); several, separated by
            commas, in the order in which points pass through them.
        output: file to write; its ending says the format.
        image: image or label map to resample.
        reference: image whose grid the result gets.
        interpolation: linear, or nearest for label maps.
        background: value where the image ends.
        points: landmarks to take through the transform, in place of an image.
        point_frame: what numbers in .csv files of landmarks are: ras (if left out), lps or voxel.
        points_image: image in which the landmarks lie, for files that count voxels.
        output_image: image in which they lie afterwards, for files that count voxels.
        style: of a .txt file of landmarks: elastix or dirlab.

    Example:
        equireg warp --image label.nii.gz --transform fixed_to_moving.nii.gz --reference fixed.nii.gz \
            --output moved_label.nii.gz --interpolation nearest
    """
    if bool(image) == bool(points):
        raise ValueError("warp takes an --image with a --reference, or --points.")
    steps = _read_transforms(transform)
    if points:
        _warp_points(steps, points, output, point_frame.lower() or None, points_image, output_image, style or None)
        return
    from .images import read_image, write_image
    from .world import field_affine, sample_transform, warp_image

    if not reference:
        raise ValueError("warp needs a --reference, the image whose grid the result gets.")
    if interpolation not in ("linear", "nearest"):
        raise ValueError(f"the interpolation is linear or nearest, got '{interpolation}'.")
    source, grid = _read_any(image, interpolation), read_image(reference, "reference image", constant=True)
    field = sample_transform(steps, field_affine(grid), grid.shape[1:])
    if interpolation == "linear" and len(source.flatten()[:: max(1, source.numel() // 10_000)].unique()) < 20:
        print("warning: the image looks like a label map: --interpolation nearest keeps its values.", file=sys.stderr)
    _spare(output, image, reference, *_listed(transform))
    write_image(warp_image(source, field, interpolation, background), output)
    print(output)


def _read_any(path: str, interpolation: str) -> MetaTensor:
    """Read an image, as whole numbers where these are to be kept and it holds nothing else."""
    from .images import read_image, read_label

    if interpolation == "nearest":
        try:
            return read_label(path, "image")
        except ValueError:
            pass  # no label map; whatever else is wrong with it comes up again
    return read_image(path, "image", constant=True)


def _warp_points(
    steps: Sequence[torch.Tensor],
    points: str,
    output: str,
    frame: str | None,
    points_image: str,
    output_image: str,
    style: str | None,
) -> None:
    """Take a file of landmarks through a transform."""
    from monai.data import MetaTensor

    from .images import read_image
    from .landmarks import Landmarks, check_inside, read_landmarks, write_landmarks
    from .world import map_points

    dims = steps[0].dim() - 1 if steps[0].dim() > 2 else len(steps[0]) - 1
    start, end = (
        read_image(path, f"image of the {what}", dims, constant=True) if path else None
        for what, path in (("points", points_image), ("output", output_image))
    )
    landmarks = read_landmarks(points, None if start is None else start.affine, frame, dims)
    grid = start if start is not None else steps[0]  # points start on the grid of a displacement field
    if isinstance(grid, MetaTensor):
        check_inside(landmarks, grid.affine, grid.shape[1:], points)
    mapped = Landmarks(map_points(landmarks.points_mm, steps), landmarks.names)
    _spare(output, points, points_image, output_image)
    style_frame = frame if output.endswith(".csv") else None
    write_landmarks(mapped, output, None if end is None else end.affine, style, style_frame)
    print(output)


def evaluate(
    *,
    output: str,
    pairs: str = "",
    moving: str = "",
    fixed: str = "",
    moving_label: str = "",
    fixed_label: str = "",
    moving_points: str = "",
    fixed_points: str = "",
    fixed_to_moving: str = "",
    moving_to_fixed: str = "",
    exports: str = "",
    picture: bool = True,
    **options: Any,
) -> None:
    """Measure registrations: overlap of labels, distance of landmarks, folding, smoothness, inverse consistency, time.

    Pairs with a transform of their own, which any program may have made, are measured as they are; the others are
    registered first, as by `equireg batch`. Writes evaluation.csv (a row for each pair), evaluation.json (mean,
    standard deviation, median and worst pairs of each measure) and prints the summary.

    Args:
        output: folder for the results, made if missing.
        pairs: list of pairs, .csv or .json, with columns named as the options below.
        moving: in place of a list, the moving image of a single pair.
        fixed: its fixed image.
        moving_label: its moving label map.
        fixed_label: its fixed label map.
        moving_points: its landmarks in the moving image.
        fixed_points: the corresponding landmarks in the fixed image.
        fixed_to_moving: its transform from fixed to moving points, if it is registered already.
        moving_to_fixed: its transform from moving to fixed points, for the inverse consistency.
        exports: as for `equireg register`.
        picture: as for `equireg register`.
        options: how to register, all as for `equireg register`, namely weights, device, spacing, optimize, method,
            similarity, background, fixed_background and point_frame.

    Example:
        equireg evaluate --pairs pairs.csv --weights hippocampus --output evaluation
    """
    single = {name: value for name, value in locals().items() if name in _PAIR_FILES and value}
    from .batch import evaluate_list
    from .shards import Shard

    shard = Shard.from_environment()
    listed = _pairs(pairs, single)
    to_register = [pair for pair in listed if not pair.get("fixed_to_moving")]
    registrar = _registrar(options) if to_register else None
    frame = options.get("point_frame", "").lower() or None
    rows, failures, totals = evaluate_list(listed, registrar, output, _listed(exports), picture, frame, shard)
    if rows:
        _print_table(
            ["measure", "mean", "sd", "median", "pairs", "worst"],
            [
                [
                    name,
                    *(_short(entry[key]) for key in ("mean", "sd", "median")),
                    entry["count"],
                    ", ".join(entry["worst"]),
                ]
                for name, entry in totals.items()
            ],
        )
        print(Path(output) / "evaluation.csv")
    _end_with(failures, len(listed), shard.count > 1)


def batch(*, pairs: str, output: str, exports: str = "", picture: bool = True, **options: Any) -> None:
    """Register a list of pairs, each into a folder of its own, going on where it was interrupted.

    Pairs that are done, from the same files with the same options, are skipped; a pair that fails does not stop the
    others. Ends with a table of failures and, if there are some, with exit code 1. Several processes may share a list:
    RANK and WORLD_SIZE in the environment say which part is whose, as torchrun sets them; these end with exit code 0.

    Args:
        pairs: list of pairs, .csv or .json, with columns moving and fixed and, where wanted, name (of the folder),
            moving_label, fixed_label, moving_points, fixed_points, moving_mask, fixed_mask, similarity_mask and
            initial_transform, which are what they are for `equireg register`. Files are named from the folder of the
            list.
        output: folder for the results, made if missing.
        exports: as for `equireg register`.
        picture: as for `equireg register`.
        options: how to register, all as for `equireg register`, namely weights, device, spacing, optimize, method,
            similarity, background, fixed_background and point_frame.

    Example:
        equireg batch --pairs pairs.csv --weights hippocampus --output registered
    """
    from .batch import register_list
    from .shards import Shard

    shard = Shard.from_environment()
    listed = _pairs(pairs, {})
    frame = options.get("point_frame", "").lower() or None
    outcomes = register_list(listed, _registrar(options), output, _listed(exports), picture, frame, shard)
    counts = {status: sum(o.status == status for o in outcomes) for status in ("registered", "done before", "failed")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    failures = {outcome.name: outcome.message for outcome in outcomes if outcome.status == "failed"}
    _end_with(failures, len(outcomes), shard.count > 1)


def compose(*, transforms: str, output: str, reference: str = "") -> None:
    """Chain transforms into one.

    Args:
        transforms: files, separated by commas, in the order in which points pass through them.
        output: file to write: a displacement field (.nii.gz) or, if all are affines, an ITK affine (.tfm, .mat, .h5).
        reference: image whose grid a displacement field gets, that in which the points start.

    Example:
        equireg compose --transforms fixed_to_middle.nii.gz,middle_to_moving.nii.gz --reference fixed.nii.gz \
            --output fixed_to_moving.nii.gz
    """
    from .images import read_image
    from .transform_files import write_transform
    from .world import field_affine, sample_transform

    steps = _read_transforms(transforms)
    _spare(output, reference, *_listed(transforms))
    if reference:
        grid = read_image(reference, "reference image", constant=True)
        steps = [sample_transform(steps, field_affine(grid), grid.shape[1:])]
    elif _is_field(output):
        raise ValueError("a displacement field needs a --reference, the image whose grid it gets.")
    write_transform(steps, output)
    print(output)


def invert(*, transform: str, output: str, reference: str = "") -> None:
    """Invert a transform.

    Args:
        transform: file, or several, separated by commas, in the order in which points pass through them.
        output: file to write: a displacement field (.nii.gz, .h5) or, if all are affines, an ITK affine (.tfm, .mat).
        reference: image in whose space the inverse starts and whose grid it gets: the moving one for fixed_to_moving.

    Example:
        equireg invert --transform fixed_to_moving.nii.gz --reference moving.nii.gz --output moving_to_fixed.nii.gz
    """
    from .images import read_image
    from .transform_files import write_transform
    from .world import affine_inverse, field_affine, invert_transform, sample_transform

    steps = _read_transforms(transform)
    _spare(output, reference, *_listed(transform))
    if not reference:
        if any(step.dim() != 2 for step in steps):
            raise ValueError("the inverse of a displacement field needs a --reference, the image whose grid it gets.")
        write_transform([affine_inverse(step) for step in reversed(steps)], output)
    else:
        grid = read_image(reference, "reference image", constant=True)
        found = invert_transform(steps, field_affine(grid), grid.shape[1:])
        if _is_field(output):
            found = [sample_transform(found, field_affine(grid), grid.shape[1:])]
        write_transform(found, output)
    print(output)


def affine(*, transform: str, output: str, mask: str = "") -> None:
    """Write the affine that fits a displacement field best.

    Args:
        transform: displacement field, or an ITK transform that holds one.
        output: ITK affine to write (.tfm, .mat, .h5).
        mask: image on the grid of the field, nonzero where it is to be fitted; everywhere if left out.

    Example:
        equireg affine --transform fixed_to_moving.nii.gz --output affine.tfm
    """
    from .images import read_mask
    from .transform_files import write_affine
    from .world import best_affine, field_affine, sample_transform

    steps = _read_transforms(transform)
    _spare(output, mask, *_listed(transform))
    fields = [step for step in steps if step.dim() != 2]
    if not fields:
        raise ValueError(f"'{transform}' holds no displacement field: it is an affine already.")
    field = sample_transform(steps, field_affine(fields[0]), fields[0].shape[1:])
    inside = read_mask(mask, "mask", like=field) if mask else None
    write_affine(best_affine(field, inside), output)
    print(output)


def equivariance(
    *,
    weights: str = "vessels",
    dataset_dir: str = "",
    output: str = "",
    pairs: int = 4,
    shifts: str = "",
    angles: str = "",
    crop: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Measure how a network's answer and its overlap hold out while one image is shifted or turned.

    Prints error (voxels) and Dice against shift and against angle; flat is equivariant. Shifts by whole voxels are
    exact by construction where nothing is cut off, all else is learned, or not.

    Args:
        weights: name of shipped weights, or a file that training wrote.
        dataset_dir: images to measure on: a folder of the Medical Segmentation Decathlon, or of the retina masks; made
            up if left out.
        output: folder for equivariance.csv and equivariance.png, a plot of the curves; nothing is written if left out.
        pairs: how many pairs are measured.
        shifts: voxels along the first axis, separated by commas; a range up to 32 if left out.
        angles: degrees in the plane of the first two axes, separated by commas; a range up to 180 if left out.
        crop: let the network see the content of each image alone, as `equireg register` does; exact for the fixed image
            as well.
        seed: of the pairs.
        device: where the network runs: cpu or cuda.

    Example:
        equireg equivariance --weights vessels --output curves
    """
    from .curves import ANGLES, SHIFTS, measure

    measure(
        weights,
        dataset_dir,
        output or None,
        pairs,
        [float(value) for value in _listed(shifts)] or SHIFTS,
        [float(value) for value in _listed(angles)] or ANGLES,
        crop=crop,
        seed=seed,
        device=device,
    )


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (register, warp, evaluate, batch, compose, invert, affine, equivariance)
}
_PAIR_FILES = (
    *("moving", "fixed", "moving_label", "fixed_label", "moving_points", "fixed_points"),
    *("fixed_to_moving", "moving_to_fixed"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: what follows `equireg`; those of this process if left out.

    Raises:
        SystemExit: with 0 after help, 1 after an error or a failed pair, 2 for a command line that makes no sense.
    """
    import fire

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from . import __version__

        print(f"equireg {__version__}")
        return
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"equireg: no command '{words[0]}': {hint}", file=sys.stderr)
        raise SystemExit(2)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries about themselves; what users should know is printed
    try:
        fire.Fire(COMMANDS, command=_normalized(words), name="equireg")
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch has no type of its own for that
            raise
        print(f"equireg: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("equireg: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _normalized(words: Sequence[str]) -> list[str]:
    """Check the options of a command before it runs, where Fire would do so after, and write them as `--name=value`.

    Values of texts are quoted, because a file called 007 is not the number seven.
    """
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return list(words)
    if {"--help", "-h"} & set(words):
        return [words[0], "--", "--help"]  # what Fire shows without calling the command
    parameters = inspect.signature(command).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    texts = {name for name in known if parameters[name].annotation == "str"} | set(_TEXT_OPTIONS)
    switches = {name for name in known if parameters[name].annotation == "bool"}
    known += _OPTIONS if len(known) < len(parameters) else ()
    normalized, given, rest = [words[0]], set(), list(words[1:])
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        name = _option(name, [*known, *(f"no{switch}" for switch in switches)], words[0])
        if not equals:
            is_switch = name.removeprefix("no") in switches
            if is_switch and (not rest or rest[0].lower() not in ("true", "false")):
                value = "True"
            else:
                value = rest.pop(0) if rest else "--"
        if not value or value.startswith("--"):
            raise SystemExit(_misuse(f"--{name} needs a value", words[0]))
        if name not in known:
            name, value = name.removeprefix("no"), str(value.lower() != "true")
        text = os.path.expanduser(value) if name in texts else _number(name, value)
        normalized.append(f"--{name}={text!r}" if name in texts else f"--{name}={text}")
        given.add(name)
    missing = [name for name in known if name in parameters and parameters[name].default is inspect.Parameter.empty]
    missing = [f"--{name}" for name in missing if name not in given]
    if missing:
        raise SystemExit(_misuse(f"{', '.join(missing)} missing", words[0]))
    return normalized


def _number(name: str, value: str) -> str:
    """Check the value of an option that is a number, several separated by commas, or true or false."""
    try:
        for part in value.strip("()[]").split(","):
            if part.strip().lower() not in ("true", "false"):
                float(part)
    except ValueError:
        raise ValueError(f"--{name} is a number, got '{value}'.") from None
    return value.title() if value.lower() in ("true", "false") else value


def _option(word: str, known: Sequence[str], command: str) -> str:
    """Return the name of an option that a command has, given as `--name` or by a letter, as the help shows them."""
    name = word.lstrip("-").replace("-", "_")
    name = f"no{name[3:]}" if name.startswith("no_") else name
    if word.startswith("--") and name in known:
        return name
    short = [option for option in known if option[0] == name]
    if word.startswith("-") and not word.startswith("--") and len(short) == 1:
        return short[0]
    if not word.startswith("-"):
        raise SystemExit(_misuse(f"unexpected '{word}': options are given as --name value", command))
    near = difflib.get_close_matches(name, known, 1)
    raise SystemExit(_misuse(f"no option {word}{f', did you mean --{near[0]}' if near else ''}", command))


def _misuse(problem: str, command: str) -> int:
    print(f"equireg {command}: {problem}; see equireg {command} --help.", file=sys.stderr)
    return 2


def _registrar(arguments: Mapping[str, Any]) -> Registrar:
    """Make a registrar from the options of a command."""
    from .registration import Registrar

    options = {name: arguments[name] for name in Registrar.OPTIONS if name in arguments}
    if options.get("device") == "cuda" and "LOCAL_RANK" in os.environ:
        import torch

        if gpus := torch.cuda.device_count():  # processes of torchrun share them out; without any, Registrar refuses
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    return Registrar(**{"progress": sys.stderr.isatty(), **options})


def _pairs(pairs: str, single: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the pairs of a list, or the single one."""
    from .batch import require_names
    from .lists import load_pairs

    if bool(pairs) == bool(single):
        raise ValueError("give --pairs with a .csv or .json list, or a single pair by --moving and --fixed.")
    if not pairs:
        if not {"moving", "fixed"} <= set(single):
            raise ValueError("a single pair needs both --moving and --fixed.")
        return [dict(single)]
    listed = load_pairs(pairs, exist=False)  # a missing file fails its pair, not the list
    require_names(listed)
    _check_columns(listed, pairs)
    return listed


def _check_columns(pairs: Sequence[Mapping[str, Any]], path: str) -> None:
    """Refuse columns that look like a misspelled one; others may hold what they like."""
    from .pairs import PAIR_KEYS

    known = (*PAIR_KEYS, "name", "fixed_to_moving", "moving_to_fixed")
    for column in dict.fromkeys(key for pair in pairs for key in pair if key not in known):
        near = difflib.get_close_matches(column, known, 1, cutoff=0.75)
        if near or column.startswith(("moving", "fixed")):
            hint = f"did you mean '{near[0]}'?" if near else f"expected {', '.join(known)}."
            raise ValueError(f"'{path}' has a column '{column}', which means nothing: {hint}")


def _spare(output: str, *inputs: str) -> None:
    """Refuse to write over what was read."""
    from .results import spare_inputs

    spare_inputs([output], inputs)


def _read_transforms(files: str) -> list[torch.Tensor]:
    """Read transforms, separated by commas, as one list of steps."""
    from .transform_files import read_transform

    steps = [step for path in _listed(files) for step in read_transform(path)]
    if not steps:
        raise ValueError(f"expected one transform or several, separated by commas, got '{files}'.")
    return steps


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_field(path: str) -> bool:
    return path.endswith((".nii", ".nii.gz"))


def _headline(report: Mapping[str, Any]) -> str:
    """Return the line by which a registration is judged first."""
    similarity = report["similarity"]
    parts = [
        f"{similarity['measure']} {similarity['before']:.3f} before, {similarity['after']:.3f} after",
        f"folding {report['folding_percent']:.3g} %",
    ]
    if "overlap" in report:
        parts.append(f"Dice {report['overlap']['dice_before']:.3f} before, {report['overlap']['dice']:.3f} after")
    if "landmarks" in report:
        landmarks = report["landmarks"]
        parts.append(f"landmarks {landmarks['tre_mm_before']:.2f} mm before, {landmarks['tre_mm']:.2f} mm after")
    parts.append(f"{report['seconds']['total']:.1f} s")
    return "; ".join(parts)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with columns as wide as their cells."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _end_with(failures: Mapping[str, str], total: int, shared: bool = False) -> None:
    """Print what failed, and leave with a code that says so, unless others are at work, whom torchrun would end."""
    if failures:
        print(f"{len(failures)} of {total} pairs failed:", file=sys.stderr)
        for name, message in failures.items():
            print(f"  {name}: {message}", file=sys.stderr)
        if not shared:
            raise SystemExit(1)
