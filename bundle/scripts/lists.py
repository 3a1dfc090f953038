"""Lists of what to register or to train on: pairs from files, subjects from folders."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "decathlon_subjects",
    "file_stem",
    "image_files",
    "listed_pairs",
    "load_pairs",
    "pair_names",
    "require_pairs",
    "result_name",
    "subjects",
]

SPLITS = ("training", "validation", "test")


def _read_json(path: Path) -> Any:
    """Parse a JSON file; a `ValueError` names the file if that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}.") from error


def _resolve(value: Any, folder: Path, where: str, exists: bool = True) -> Any:
    """Make a path, or a list of them (one file per channel), absolute and check that the files exist."""
    if isinstance(value, list) and value:
        return [_resolve(entry, folder, where, exists) for entry in value]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected a file path, got {value!r}.")
    path = (folder / Path(value).expanduser()).absolute()
    if exists and not path.exists():
        raise ValueError(f"{where}: '{value}' does not exist (looked for '{path}').")
    return str(path)


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a table with a header as (where it stands, cells)."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = reader.fieldnames or []
            if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
                raise ValueError(f"'{path}': cells should be separated by commas, got {header[0]!r}.")
            for row in reader:
                where = f"'{path}', line {reader.line_num}"
                if None in row or None in row.values():  # how DictReader marks cells too many or too few
                    raise ValueError(f"{where}: expected {len(reader.fieldnames or [])} cells, as in the header.")
                rows.append((where, {key.strip(): cell.strip() for key, cell in row.items()}))
    except UnicodeDecodeError as error:
        raise ValueError(f"Cannot read '{path}': it should be saved as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"Cannot read '{path}': {error}.") from error
    return rows


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a list of pairs as (where it stands, entries)."""
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() != ".json":
        raise ValueError(f"A list of pairs is a .json or .csv file, got '{path}'.")
    content = _read_json(path)
    pairs = content.get("pairs") if isinstance(content, dict) else content
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"'{path}': expected a list of dictionaries, or a dictionary with such a list as 'pairs'.")
    return [(f"'{path}', pair {number}", pair) for number, pair in enumerate(pairs, start=1)]


def load_pairs(path: str | Path, exist: bool = True) -> list[dict[str, Any]]:
    r"""Read a list of pairs from a JSON or CSV file.

    JSON holds a list of dictionaries, or a dictionary with that list as `pairs`; CSV has a header. `moving` and `fixed`
    are required. Every entry whose name begins with `moving` or `fixed` (`moving_label`, ...), `similarity_mask` and
    `initial_transform` are file paths, resolved against the folder of the list; other entries are passed on, and empty
    ones are left out.

    Args:
        path: the `.json` or `.csv` file.
        exist: refuse the list if one of its files is missing.

    Returns:
        One dictionary per pair, with absolute paths; `monai.data.Dataset` takes the list as it is.

    Raises:
        ValueError: naming file and row, if the list cannot be read or is empty, or a column or a file is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a.nii", "b.nii"):
        ...         Path(folder, name).touch()
        ...     _ = Path(folder, "pairs.csv").write_text("moving,fixed\na.nii,b.nii\n")
        ...     [Path(pair["fixed"]).name for pair in load_pairs(Path(folder, "pairs.csv"))]
        ['b.nii']
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no list of pairs '{path}'.")
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"'{path}': the list holds no pair.")
    pairs = []
    for where, row in rows:
        entries = {key: value for key, value in row.items() if value not in ("", None)}
        missing = [key for key in ("moving", "fixed") if key not in entries]
        if missing:
            raise ValueError(f"{where}: no entry for {' and '.join(missing)}, got {sorted(row)}.")
        for key, value in entries.items():
            if key.startswith(("moving", "fixed")) or key in ("similarity_mask", "initial_transform"):
                entries[key] = _resolve(value, path.parent, f"{where}, {key}", exist)
        pairs.append(entries)
    return pairs


def listed_pairs(pairs: str | Path | None, moving: str | None = None, fixed: str | None = None) -> list[dict[str, Any]]:
    """Return the pairs a config asks for: one named by its two files, or all of a list file.

    Args:
        pairs: list file, see `load_pairs`; not read if the two files are given.
        moving: the moving image's file.
        fixed: the fixed image's file.

    Returns:
        Pairs `{"moving": path, "fixed": path, ...}`; none if nothing is asked for.

    Raises:
        ValueError: if only one of the two files is given, or either does not exist; and as `load_pairs`.

    Example:
        >>> listed_pairs("")
        []
    """
    if not moving and not fixed:
        return load_pairs(pairs) if pairs else []
    if not moving or not fixed:
        raise ValueError(f"a pair needs both images, got moving '{moving}' and fixed '{fixed}'.")
    for path in (moving, fixed):
        if not Path(path).exists():
            raise ValueError(f"the image '{path}' does not exist.")
    return [{"moving": str(moving), "fixed": str(fixed)}]


def file_stem(path: Any) -> str:
    """Return the name of an image's file without folder and suffix.

    Args:
        path: the file, or a list of files, one per channel, of which the first counts.

    Raises:
        ValueError: for what names no file.

    Example:
        >>> file_stem("study/scan.v2.nii.gz"), file_stem(["t1.png", "t2.png"])
        ('scan.v2', 't1')
    """
    first = path[0] if isinstance(path, (list, tuple)) and path else path
    name = os.path.basename(first) if isinstance(first, (str, os.PathLike)) else ""
    stem, suffix = os.path.splitext(name)
    if not stem:
        raise ValueError(f"expected the path of a file, or a list of them, got {path!r}.")
    return os.path.splitext(stem)[0] if suffix == ".gz" else stem


def result_name(paths: Sequence[Any]) -> str:
    """Return what the results made of these files are called: their stems, joined by "_to_".

    Args:
        paths: files as for `file_stem`, the moving image's first.

    Raises:
        ValueError: as `file_stem`.

    Example:
        >>> result_name(["study/moving.nii.gz", "atlas.png"])
        'moving_to_atlas'
    """
    return "_to_".join(map(file_stem, paths))


def require_pairs(data: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to register nothing, or pairs whose results would overwrite each other.

    Args:
        data: the pairs.

    Raises:
        ValueError: if there are none, or if two pairs have the same `result_name`.
    """
    if len(data) == 0:
        raise ValueError("no pair to register: give --moving and --fixed, or --pairs with a JSON or CSV list.")
    seen: dict[str, Mapping[str, Any]] = {}
    for pair in data:
        name = result_name([pair["moving"], pair["fixed"]])
        if name in seen:
            raise ValueError(
                f"results are named after the files without their suffixes, and those of two pairs would both be "
                f"called {name}: {dict(seen[name])} and {dict(pair)}; register them into folders of their own."
            )
        seen[name] = pair


def pair_names(batch: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Name each pair of a decollated batch by its files, in the form MONAI's `MetricsSaver` asks of `batch_transform`.

    Args:
        batch: items with "moving" and "fixed"; those without a file name are called "synthetic".

    Returns:
        For each item `{"filename_or_obj": "moving file -> fixed file"}`.

    Example:
        >>> pair_names([{"moving": "a tensor", "fixed": "without a file"}])
        [{'filename_or_obj': 'synthetic -> synthetic'}]
    """

    def name(image: Any) -> str:
        return Path(str(getattr(image, "meta", {}).get("filename_or_obj", "synthetic"))).name

    return [{"filename_or_obj": f"{name(item['moving'])} -> {name(item['fixed'])}"} for item in batch]


def decathlon_subjects(dataset_dir: str | Path, split: str) -> list[dict[str, str]]:
    """List the subjects of one split of a data set in the layout of the Medical Segmentation Decathlon.

    The entries of `training` in `dataset.json` are sorted by file name, shuffled by
    `numpy.random.default_rng(seed=0).permutation`, and cut into "training", "validation" and "test", in this order. A
    tenth validates and a fifth tests, rounded down but at least two subjects each; the rest trains. The same file names
    always give the same split.

    Args:
        dataset_dir: the folder that holds `dataset.json`.
        split: "training", "validation" or "test".

    Returns:
        One dictionary per subject, with absolute paths: `image`, and `label` if there is one.

    Raises:
        ValueError: for an unknown split; if `dataset.json` is missing or broken, or lists fewer than 6 subjects or a
            file that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"decathlon_subjects expects a split of {SPLITS}, got '{split}'.")
    path = Path(dataset_dir) / "dataset.json"
    if not path.is_file():
        raise ValueError(f"'{dataset_dir}' holds no dataset.json: expected a Medical Segmentation Decathlon task.")
    content = _read_json(path)
    entries = content.get("training") if isinstance(content, dict) else None
    named = isinstance(entries, list) and all(isinstance(e, dict) and isinstance(e.get("image"), str) for e in entries)
    if entries is None or not named:
        raise ValueError(f"'{path}': expected 'training' to be a list of dictionaries with a file name as 'image'.")
    if len(entries) < 6:
        raise ValueError(f"'{path}': expected at least 6 subjects, two for each split, got {len(entries)}.")
    ordered = sorted(entries, key=lambda entry: Path(entry["image"]).name)
    order = np.random.default_rng(seed=0).permutation(len(ordered))
    test = len(ordered) - max(2, len(ordered) // 5)
    validation = test - max(2, len(ordered) // 10)
    chosen = {"training": order[:validation], "validation": order[validation:test], "test": order[test:]}[split]
    return [
        {
            key: _resolve(ordered[i][key], path.parent, f"'{path}', {key} of '{ordered[i]['image']}'")
            for key in ("image", "label")
            if ordered[i].get(key)
        }
        for i in chosen
    ]


def image_files(
    dataset_dir: str | Path, patterns: Sequence[str], person: str, split: str, fractions: Sequence[float] = (0.7, 0.1)
) -> list[dict[str, str]]:
    """List the images of plain folders, split by person.

    Persons are sorted, shuffled by a fixed seed and cut into training, validation and test, so that all images of one
    person fall into one split.

    Args:
        dataset_dir: the folder the patterns start from.
        patterns: glob patterns of image files.
        person: regular expression whose first group, in a file's path below `dataset_dir`, names the person.
        split: "training", "validation" or "test".
        fractions: share of persons for training and validation; the rest is for test.

    Returns:
        Subjects `{"image": path}`, sorted by path.

    Raises:
        ValueError: for an unknown split, when nothing matches, or a file of which the expression finds no person.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("a_left", "a_right", "b_left", "c_left"):
        ...     (folder / f"{name}.png").touch()
        >>> sum(len(image_files(folder, ["*.png"], "(.)_", split, (0.4, 0.3))) for split in SPLITS)
        4
    """
    if split not in SPLITS:
        raise ValueError(f"image_files expects a split of {SPLITS}, got '{split}'.")
    root = Path(dataset_dir)
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    if not files:
        raise ValueError(f"image_files found no file for {list(patterns)} in {root}.")
    persons: dict[str, list[Path]] = {}
    for path in files:
        match = re.search(person, path.relative_to(root).as_posix())
        if match is None:
            raise ValueError(f"image_files expects '{person}' to find the person in {path}, it does not match.")
        persons.setdefault(match.group(1), []).append(path)
    names = sorted(persons)
    order = np.random.default_rng(0).permutation(len(names))
    ends = np.cumsum([round(fraction * len(names)) for fraction in fractions])
    part = np.split(order, ends)[SPLITS.index(split)]
    return [{"image": str(path)} for path in sorted(path for k in part for path in persons[names[k]])]


def subjects(dataset_dir: str | Path | None, split: str) -> list[dict[str, str]] | None:
    """List the subjects of a data set, or return None, which stands for the embedded synthetic data.

    Args:
        dataset_dir: a folder as for `decathlon_subjects`; "" or None for the synthetic data.
        split: "training", "validation" or "test".

    Raises:
        ValueError: as `decathlon_subjects`.

    Example:
        >>> subjects("", "training") is None
        True
    """
    if dataset_dir is None or str(dataset_dir) == "":
        return None
    return decathlon_subjects(dataset_dir, split)
