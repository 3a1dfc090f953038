"""Many pairs: register and measure all of a list, going on where it was interrupted and where a pair fails."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evaluation import jsonable, landmark_error, overlap, regularity, round_trip
from .images import writable_folder
from .lists import result_name
from .pairs import PAIR_KEYS, fingerprint, fingerprints, input_names, read_pair
from .progress import progress
from .registration import Registrar
from .report import software
from .results import REPORT, check_results, save_registration, write_text
from .shards import Shard
from .transform_files import read_transform
from .world import field_affine, sample_transform, warp_image

__all__ = [
    "EXPECTED_ERRORS",
    "Outcome",
    "evaluate_list",
    "evaluate_pair",
    "finished_report",
    "one_line",
    "pair_name",
    "register_list",
    "register_pair",
    "require_names",
    "summary",
    "write_table",
]


# What a bad input or too small a machine ends in: one sentence, not a traceback. torch has no type for "out of memory".
EXPECTED_ERRORS = (ValueError, OSError, ImportError, MemoryError, RuntimeError)
# What marks, in place of measures, the row of a pair that failed.
_FAILED = "failed"


def one_line(error: BaseException) -> str:
    r"""Return what an error says, in one line.

    Example:
        >>> one_line(MemoryError()), one_line(ValueError("two\nlines"))
        ('out of memory', 'two lines')
    """
    if isinstance(error, MemoryError):
        return "out of memory"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    Args:
        name: of the pair.
        status: "registered", "done before" or "failed".
        message: what went wrong, one sentence; or what may be wrong with the result.
    """

    name: str
    status: str
    message: str = ""


def pair_name(pair: Mapping[str, Any]) -> str:
    """Return the name of a pair, and so of the folder of its results: its `name`, or that of its files.

    Args:
        pair: files, `moving` and `fixed` at least.

    Raises:
        ValueError: if its name is no name for a folder.

    Example:
        >>> pair_name({"moving": "a/one.nii.gz", "fixed": "b/two.nii.gz"})
        'one_to_two'
    """
    name = str(pair.get("name") or result_name([pair["moving"], pair["fixed"]]))
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"the name of a pair names a folder, got '{name}'.")
    return name


def require_names(pairs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a list without pairs, or with two of one name, whose results would overwrite each other.

    Args:
        pairs: files.

    Raises:
        ValueError: naming the first name that occurs twice.
    """
    if not pairs:
        raise ValueError("there is no pair in the list.")
    names = [pair_name(pair) for pair in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two pairs of the list are called '{twice}': give each a name of its own in a column 'name'.")


def finished_report(
    pair: Mapping[str, Any],
    folder: Path,
    options: Mapping[str, Any],
    exports: Sequence[str] = (),
    picture: bool = False,
) -> dict[str, Any] | None:
    """Return the report of a pair's results that were made of these inputs, as they are now, with these options.

    Args:
        pair: files.
        folder: where its results would be.
        options: of the `Registrar`, with the `point_frame`.
        exports: what should be there as well.
        picture: whether `qc.png` should be.

    Returns:
        None if there is no such report, it cannot be read, one of its files is missing, or another version of the
        package wrote it.
    """
    try:
        found: dict[str, Any] = json.loads((folder / REPORT).read_text())
        complete = all((folder / name).is_file() for name in found["files"].values())
        complete = complete and all(isinstance(warning, str) for warning in found["warnings"])
        wanted = set(exports) <= set(found["exports"]) and (found["picture"] or not picture)
        same = (
            found["inputs"] == input_names(pair)
            and found["input_states"] == fingerprints(pair)
            and found["options"] == json.loads(json.dumps(options))
            and found["software"]["equireg"] == software()["equireg"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if complete and wanted and same else None


def register_pair(
    registrar: Registrar,
    pair: Mapping[str, Any],
    folder: Path,
    exports: Sequence[str] = (),
    picture: bool = True,
    point_frame: str | None = None,
) -> Outcome:
    """Register one pair of a list into a folder, unless that is done; a failure is told, not raised.

    Args:
        registrar: with the network and the options.
        pair: files, see `equireg.pairs.PAIR_KEYS`.
        folder: where the results go.
        exports: see `equireg.results.save_registration`.
        picture: draw `qc.png`.
        point_frame: frame of CSV files of landmarks.

    Returns:
        What became of it.
    """
    name, options = pair_name(pair), {**registrar.options, "point_frame": point_frame}
    report = finished_report(pair, folder, options, exports, picture)
    if report is not None:
        return Outcome(name, "done before", " ".join(report["warnings"]))
    try:
        parts = {key: pair[key] for key in PAIR_KEYS if key in pair}
        result = registrar(**parts, point_frame=point_frame)
        save_registration(result, folder, exports, picture)
    except EXPECTED_ERRORS as error:
        return Outcome(name, "failed", one_line(error))
    return Outcome(name, "registered", " ".join(result.report["warnings"]))


def evaluate_pair(pair: Mapping[str, Any], point_frame: str | None = None, background: float = 0.0) -> dict[str, float]:
    """Measure a transform, whichever program made it, by what goes with the images.

    Args:
        pair: files: `moving`, `fixed` and `fixed_to_moving`, a transform that `equireg.transform_files` reads; and
            where they are there `moving_to_fixed`, both labels and both landmarks.
        point_frame: frame of CSV files of landmarks.
        background: value of the background of the fixed image, whose content inverse consistency is measured on, unless
            the pair has a mask of it.

    Returns:
        Folding and smoothness of the transform on the fixed image's grid, and where it can be measured inverse
        consistency, overlap and distance of landmarks; see `equireg.evaluation`.

    Raises:
        ValueError: as `equireg.pairs.read_pair`, or if a transform cannot be read or does not fit the images.
    """
    unused = ("moving_mask", "similarity_mask", "initial_transform")
    parts = read_pair({key: pair.get(key) for key in PAIR_KEYS if key not in unused}, None, point_frame)
    fixed, moving = parts["fixed"], parts["moving"]
    transform = read_transform(pair["fixed_to_moving"])
    field = sample_transform(transform, field_affine(fixed), fixed.shape[1:])
    scores: dict[str, float] = {}
    if "moving_label" in parts and "fixed_label" in parts:
        scores.update(overlap(warp_image(parts["moving_label"], field, "nearest"), parts["fixed_label"]))
    if "moving_points" in parts and "fixed_points" in parts:
        scores.update(landmark_error(parts["fixed_points"], parts["moving_points"], transform))
    scores.update(regularity(field))
    if pair.get("moving_to_fixed"):
        back = sample_transform(read_transform(pair["moving_to_fixed"]), field_affine(moving), moving.shape[1:])
        content = parts["fixed_mask"].as_tensor() if "fixed_mask" in parts else fixed.as_tensor() != background
        scores.update(round_trip(field, back, content))
    return scores


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as a CSV file; columns are those of all rows, in the order in which they first occur.

    Args:
        rows: at least one; NaN and what is not there become empty cells.
        path: the file, in a folder that exists.

    Returns:
        The path.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return write_text(text.getvalue(), path)


def summary(rows: Iterable[Mapping[str, Any]], worst: int = 3) -> dict[str, dict[str, Any]]:
    """Summarize the numbers of a table, column by column.

    Args:
        rows: of the table, each with a `name`.
        worst: how many of the worst rows to name.

    Returns:
        For each column of numbers "mean", "sd" (over rows; None for a single one), "median", "count" of rows that have
        a value, and "worst", the names of the rows where it is worst.

    Example:
        >>> summary([{"name": "a", "dice": 0.5}, {"name": "b", "dice": 0.7}], worst=1)["dice"]["worst"]
        ['a']
    """
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float)))
    result: dict[str, dict[str, Any]] = {}
    for column in columns:
        known = [(row[column], row["name"]) for row in rows if _is_number(row.get(column))]
        if not known:
            continue
        values = [value for value, _ in known]
        better_high = column.startswith("dice")
        ordered = sorted(known, key=lambda entry: entry[0], reverse=not better_high)
        result[column] = {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "median": statistics.median(values),
            "count": len(values),
            "worst": [name for _, name in ordered[:worst]],
        }
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def register_list(
    pairs: Sequence[Mapping[str, Any]],
    registrar: Registrar,
    folder: str | Path,
    exports: Sequence[str] = (),
    picture: bool = True,
    point_frame: str | None = None,
    shard: Shard | None = None,
) -> list[Outcome]:
    """Register the pairs of a list, each into a folder named after it, and note what became of each in `batch.csv`.

    Args:
        pairs: files, with names that differ.
        registrar: with the network and the options.
        folder: where the folders go.
        exports: see `equireg.results.save_registration`.
        picture: draw `qc.png` for each.
        point_frame: frame of CSV files of landmarks.
        shard: the part of the list that is this process's; all of it if left out.

    Returns:
        What became of each pair, or of each of this process's.

    Raises:
        ValueError: if the folder cannot be written to.
    """
    check_results(folder, exports)
    folder, shard = writable_folder(folder), shard or Shard()
    outcomes: list[Outcome] = []
    for pair in progress(shard.take(pairs), "registering", "pair"):
        outcomes.append(register_pair(registrar, pair, folder / pair_name(pair), exports, picture, point_frame))
        if shard.count == 1:
            write_table([vars(outcome) for outcome in outcomes], folder / "batch.csv")
    rows, names = [vars(outcome) for outcome in outcomes], [pair_name(pair) for pair in pairs]
    key = _key(pairs, registrar, point_frame) if shard.count > 1 else ""
    shard.join(rows, names, folder, "batch", lambda found: found and write_table(found, folder / "batch.csv"), key)
    return outcomes


def evaluate_list(
    pairs: Sequence[Mapping[str, Any]],
    registrar: Registrar | None,
    folder: str | Path,
    exports: Sequence[str] = (),
    picture: bool = True,
    point_frame: str | None = None,
    shard: Shard | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, dict[str, Any]]]:
    """Measure the pairs of a list, registering those that bring no transform, and write `evaluation.csv` and `.json`.

    Args:
        pairs: files, see `evaluate_pair`; those without `fixed_to_moving` are registered first, see `register_list`.
        registrar: for these pairs; may be None if there are none.
        folder: where results go.
        exports: see `equireg.results.save_registration`.
        picture: draw `qc.png` for each pair that is registered.
        point_frame: frame of CSV files of landmarks.
        shard: the part of the list that is this process's; all of it if left out.

    Returns:
        A row of numbers for each pair that could be measured, with its `name`; a sentence for each that could not; and
        the summary of the rows. Where processes share the list, of all pairs that are measured by now.

    Raises:
        ValueError: if the folder cannot be written to.
    """
    folder, shard = writable_folder(folder), shard or Shard()
    ready = [pair for pair in pairs if pair.get("fixed_to_moving")]
    unregistered = [pair for pair in pairs if not pair.get("fixed_to_moving")]
    outcomes: list[Outcome] = []
    if registrar is not None:
        outcomes = register_list(unregistered, registrar, folder, exports, picture, point_frame, shard)
    failures = {outcome.name: outcome.message for outcome in outcomes if outcome.status == "failed"}
    background = 0.0 if registrar is None else registrar.options["background"][1]
    rows: list[dict[str, Any]] = []
    for pair in progress([*shard.take(ready), *shard.take(unregistered)], "measuring", "pair"):
        name = pair_name(pair)
        try:
            if name in failures:
                raise ValueError(failures[name])
            rows.append({"name": name, **_measured(pair, folder / name, point_frame, background)})
        except EXPECTED_ERRORS as error:
            rows.append({"name": name, _FAILED: one_line(error)})
    names = [pair_name(pair) for pair in pairs]
    key = _key(pairs, registrar, point_frame) if shard.count > 1 else ""
    found = shard.join(rows, names, folder, "evaluation", lambda found: _write_evaluation(found, names, folder), key)
    return _split(found)


def _key(pairs: Sequence[Mapping[str, Any]], registrar: Registrar | None, point_frame: str | None) -> str:
    """Name what rows are of: the list, the files as they are now, the options and this version."""
    states = []
    for pair in pairs:
        given = [pair[key] for key in ("fixed_to_moving", "moving_to_fixed") if pair.get(key)]
        transforms = [(str(path), fingerprint(path)) for path in given]
        states.append([pair_name(pair), input_names(pair), fingerprints(pair), transforms])
    options = None if registrar is None else registrar.options
    text = json.dumps([states, options, point_frame, software()["equireg"]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _measured(
    pair: Mapping[str, Any], made: Path, point_frame: str | None, background: float
) -> dict[str, float | str | None]:
    """Measure a pair, whose transforms are in a folder that `register_pair` made if it has none of its own."""
    row: dict[str, Any] = {}
    if not pair.get("fixed_to_moving"):
        pair = {**pair, **{key: made / f"{key}.nii.gz" for key in ("fixed_to_moving", "moving_to_fixed")}}
        report = json.loads((made / REPORT).read_text())
        row["seconds"] = report["seconds"]["total"]
        row["network_inverse_consistency_mm"] = report["network_inverse_consistency_mm"]
        row["warnings"] = " ".join(report["warnings"])
    return {**row, **evaluate_pair(pair, point_frame, background)}


def _split(
    found: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, dict[str, Any]]]:
    """Tell measured rows from failures, and summarize the rows."""
    rows = [row for row in found if _FAILED not in row]
    return rows, {row["name"]: row[_FAILED] for row in found if _FAILED in row}, summary(rows)


def _write_evaluation(found: Sequence[dict[str, Any]], names: Sequence[str], folder: Path) -> None:
    rows, failures, totals = _split(found)
    (folder / "evaluation.csv").unlink(missing_ok=True)
    if rows:
        write_table(rows, folder / "evaluation.csv")
    missing = sorted(set(names) - {row["name"] for row in found})  # left to processes that have not ended
    result = {"pairs": len(names), "missing": missing, "failed": failures, "summary": totals}
    write_text(json.dumps(jsonable(result), indent=2) + "\n", folder / "evaluation.json")
