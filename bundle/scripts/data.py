"""Where pairs come from: lists of pairs, flat lists of subjects, or synthetic anatomy.

An item holds `moving` and `fixed`, and `moving_label` and `fixed_label` where both subjects have a label.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset
from torch.utils.data import RandomSampler

from .augmentation import RandWarpPaird
from .synthesis import KINDS, synthetic_pair

__all__ = [
    "WarpedPairDataset",
    "image_files",
    "listed_pairs",
    "pair_names",
    "require_pairs",
    "PairDataset",
    "SyntheticPairDataset",
    "decathlon_subjects",
    "load_pairs",
    "ordered_pair",
    "pair_dataset",
    "pair_sampler",
    "subjects",
]

SPLITS = ("training", "validation", "test")
TransformLike = Callable[[Any], Any] | Sequence[Callable[[Any], Any]]


def _read_json(path: Path) -> Any:
    """Parse a JSON file; a `ValueError` names the file if that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}.") from error


def _resolve(value: Any, folder: Path, where: str) -> Any:
    """Make a path, or a list of them (one file per channel), absolute and check that the files exist."""
    if isinstance(value, list) and value:
        return [_resolve(entry, folder, where) for entry in value]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected a file path, got {value!r}.")
    path = (folder / Path(value).expanduser()).absolute()
    if not path.exists():
        raise ValueError(f"{where}: '{value}' does not exist (looked for '{path}').")
    return str(path)


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a table with a header as (where it stands, cells)."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            for row in reader:
                where = f"'{path}', line {reader.line_num}"
                if None in row or None in row.values():  # how DictReader marks cells too many or too few
                    raise ValueError(f"{where}: expected {len(reader.fieldnames or [])} cells, as in the header.")
                rows.append((where, {key.strip(): cell.strip() for key, cell in row.items()}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
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


def load_pairs(path: str | Path) -> list[dict[str, Any]]:
    r"""Read a list of pairs from a JSON or CSV file.

    JSON holds a list of dictionaries, or a dictionary with that list as `pairs`; CSV has a header. `moving` and `fixed`
    are required. Every entry whose name begins with `moving` or `fixed` (`moving_label`, ...) is a file path, resolved
    against the folder of the list; other entries are passed on, and empty ones are left out.

    Args:
        path: the `.json` or `.csv` file.

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
            if key.startswith(("moving", "fixed")):
                entries[key] = _resolve(value, path.parent, f"{where}, {key}")
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


def require_pairs(data: Sized) -> None:
    """Refuse to run on nothing.

    Args:
        data: the pairs.

    Raises:
        ValueError: if there are none.
    """
    if len(data) == 0:
        raise ValueError("no pair to register: give --moving and --fixed, or --pairs with a JSON or CSV list.")


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


def subjects(dataset_dir: str | Path | None, split: str) -> list[dict[str, str]]:
    """List the subjects of a data set, or none, which stands for the embedded synthetic data.

    Args:
        dataset_dir: a folder as for `decathlon_subjects`; "" or None for the synthetic data.
        split: "training", "validation" or "test".

    Raises:
        ValueError: as `decathlon_subjects`.

    Example:
        >>> subjects("", "training")
        []
    """
    if dataset_dir is None or str(dataset_dir) == "":
        return []
    return decathlon_subjects(dataset_dir, split)


def ordered_pair(index: int, count: int) -> tuple[int, int]:
    """Return the ordered pair of two different subjects with a given number: a bijection.

    Args:
        index: number of the pair, 0 to `count * (count - 1) - 1`.
        count: number of subjects.

    Raises:
        ValueError: if the index is out of range.

    Example:
        >>> [ordered_pair(k, 3) for k in range(6)]
        [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    """
    if not 0 <= index < count * (count - 1):
        raise ValueError(f"ordered_pair expects an index from 0 to {count * (count - 1) - 1}, got {index}.")
    moving, other = divmod(index, count - 1)
    return moving, other + (other >= moving)


class _IndexedPairs(Dataset):
    """A MONAI dataset whose items are made from their index; a subclass says how many there are and how."""

    def __init__(self, data: Sequence[Any], transform: TransformLike | None, length: int) -> None:
        super().__init__(data=data, transform=transform)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def _pair(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _transform(self, index: int) -> Any:
        position = index + self.length if index < 0 else index
        if not 0 <= position < self.length:
            raise IndexError(f"Pair {index} of {self.length}.")
        return self.transform(self._pair(int(position)))


class PairDataset(_IndexedPairs):
    """Ordered pairs of different subjects from a flat list of subjects.

    Pair `k` is `ordered_pair(k, N)` of the `N (N - 1)` there are. Draw from them with `pair_sampler` to train, or fix a
    subset with `num_pairs` to validate. Subjects are loaded on first use and then kept, in this process: with
    `num_workers > 0` make the workers persistent.

    Args:
        data: subjects, each a mapping with `image` and perhaps `label`.
        load: transforms of one subject; the result of those before the first random one is cached.
        transform: transforms of one pair.
        num_pairs: keep at most this many pairs, drawn by `seed` without replacement; None keeps all.
        seed: seed of that draw.
        cache_rate: fraction of the subjects to keep in memory.
        runtime_cache: as in `monai.data.CacheDataset`; "processes" shares the cache among workers, False fills it at
            construction.

    Raises:
        ValueError: for fewer than two subjects, one without `image`, or a `num_pairs` below 1.

    Example:
        >>> people = [{"image": name} for name in "abc"]
        >>> PairDataset(people)[5]
        {'moving': 'c', 'fixed': 'b'}
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        load: TransformLike | None = None,
        transform: TransformLike | None = None,
        num_pairs: int | None = None,
        seed: int = 0,
        cache_rate: float = 1.0,
        runtime_cache: bool | str = True,
    ) -> None:
        count = len(data)
        if count < 2:
            raise ValueError(f"PairDataset expects at least two subjects to make a pair, got {count}.")
        for number, subject in enumerate(data):
            if not isinstance(subject, Mapping) or "image" not in subject:
                raise ValueError(f"PairDataset expects subjects with an 'image', got {subject!r} as number {number}.")
        if num_pairs is not None and num_pairs < 1:
            raise ValueError(f"PairDataset expects num_pairs to be None or at least 1, got {num_pairs}.")
        total = count * (count - 1)
        self.chosen: np.ndarray | None = None
        if num_pairs is not None and num_pairs < total:
            self.chosen = np.random.default_rng(seed).choice(total, num_pairs, replace=False)
        super().__init__(data, transform, total if self.chosen is None else len(self.chosen))
        self.subjects = CacheDataset(
            data, transform=load, cache_rate=cache_rate, progress=False, runtime_cache=runtime_cache
        )

    def _pair(self, index: int) -> dict[str, Any]:
        number = index if self.chosen is None else int(self.chosen[index])
        # Copies, because the cache hands out the tensors it keeps.
        moving, fixed = (deepcopy(self.subjects[i]) for i in ordered_pair(number, len(self.data)))
        pair = {"moving": moving["image"], "fixed": fixed["image"]}
        if moving.get("label") is not None and fixed.get("label") is not None:
            pair["moving_label"], pair["fixed_label"] = moving["label"], fixed["label"]
        return pair


class SyntheticPairDataset(_IndexedPairs):
    """Endless pairs of synthetic anatomy; before `transform`, an item is a pure function of `(seed, index)`.

    Args:
        spatial_dims: 2 or 3.
        shape: voxels along each axis; one number stands for all.
        length: how many items the dataset claims to have.
        seed: another seed gives other items: give training and validation different ones.
        transform: transforms of one pair.
        max_shift: largest shift of each image along an axis, voxels; see `synthesis.synthetic_pair`.
        kind: "labels", "vessels" or "mixed".

    Raises:
        ValueError: for a shape that does not match `spatial_dims`, an unknown kind or a length below 1.

    Example:
        >>> SyntheticPairDataset(2, 40)[7]["moving"].shape
        torch.Size([1, 40, 40])
    """

    def __init__(
        self,
        spatial_dims: int,
        shape: int | Sequence[int],
        length: int = 1_000_000,
        seed: int = 0,
        transform: TransformLike | None = None,
        max_shift: int | Sequence[int] | None = None,
        kind: str = "labels",
    ) -> None:
        sizes = [shape] * spatial_dims if isinstance(shape, int) else [int(s) for s in shape]
        if spatial_dims not in (2, 3) or len(sizes) != spatial_dims:
            raise ValueError(f"SyntheticPairDataset expects 2 or 3 sizes, got {spatial_dims} dimensions and {shape}.")
        if kind not in KINDS or length < 1:
            raise ValueError(f"SyntheticPairDataset expects kind {KINDS} and length >= 1, got '{kind}' and {length}.")
        super().__init__([], transform, length)
        self.shape, self.seed, self.max_shift, self.kind = sizes, seed, max_shift, kind

    def _pair(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.seed, index])
        return dict(synthetic_pair(self.shape, generator, self.max_shift, self.kind))


class WarpedPairDataset(_IndexedPairs):
    """Endless pairs of an image and a randomly warped copy of it; an item's warp is a pure function of `(seed, index)`.

    Args:
        data: subjects, each a mapping with `image`; item `k` takes subject `k` modulo their number.
        warp: makes moving and fixed from `image`.
        load: transforms of one subject; the result of those before the first random one is cached.
        transform: transforms of one pair.
        length: how many items the dataset claims to have.
        seed: another seed gives other warps.

    Raises:
        ValueError: if there are no subjects, or for a length below 1.

    Example:
        >>> subjects = [{"image": torch.rand(1, 24, 24)}]
        >>> sorted(WarpedPairDataset(subjects, RandWarpPaird())[3])
        ['fixed', 'image', 'moving', 'true_ddf']
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        warp: RandWarpPaird,
        load: TransformLike | None = None,
        transform: TransformLike | None = None,
        length: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        if not data or length < 1:
            raise ValueError(f"WarpedPairDataset expects subjects and a length >= 1, got {len(data)} and {length}.")
        super().__init__(data, transform, length)
        self.subjects = CacheDataset(data, transform=load, progress=False, runtime_cache=True)
        self.warp, self.seed = warp, seed

    def _pair(self, index: int) -> dict[str, Any]:
        self.warp.set_random_state(state=np.random.RandomState([self.seed, index]))
        item: dict[Any, Any] = self.warp(deepcopy(self.subjects[index % len(self.data)]))
        return item


def pair_dataset(
    data: Sequence[Mapping[str, Any]] | None,
    load: TransformLike | None,
    transform: TransformLike | None,
    spatial_dims: int,
    shape: int | Sequence[int],
    num_pairs: int | None = None,
    seed: int = 0,
    max_shift: int | Sequence[int] | None = None,
    kind: str = "labels",
    cache_rate: float = 1.0,
    runtime_cache: bool | str = True,
) -> PairDataset | SyntheticPairDataset:
    """Make the dataset of a config: pairs of the given subjects, or of synthetic anatomy if there are none.

    Args:
        data: flat list of subjects; empty or None for synthetic data.
        load: transforms of one subject; not applied to synthetic data, which comes as tensors.
        transform: transforms of one pair.
        spatial_dims: 2 or 3, for synthetic data.
        shape: voxels along each axis, for synthetic data.
        num_pairs: keep at most this many pairs; None keeps all (a million synthetic ones).
        seed: seed of the choice of pairs, and of the synthetic data.
        max_shift: largest shift of synthetic images, voxels.
        kind: "labels", "vessels" or "mixed" synthetic data.
        cache_rate: fraction of the subjects to keep in memory.
        runtime_cache: as in `PairDataset`.

    Raises:
        ValueError: as the two dataset classes.

    Example:
        >>> len(pair_dataset([], None, None, spatial_dims=2, shape=40, num_pairs=8))
        8
    """
    if data:
        return PairDataset(data, load, transform, num_pairs, seed, cache_rate, runtime_cache)
    length = 1_000_000 if num_pairs is None else num_pairs
    return SyntheticPairDataset(spatial_dims, shape, length, seed, transform, max_shift, kind)


def pair_names(batch: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Name each pair of a decollated batch by its files, in the form MONAI's `MetricsSaver` asks of `batch_transform`.

    Args:
        batch: items with "moving" and "fixed"; those without a file name are called "synthetic".

    Returns:
        For each item `{"filename_or_obj": "moving file -> fixed file"}`.

    Example:
        >>> pair_names([{"moving": torch.zeros(1), "fixed": torch.zeros(1)}])
        [{'filename_or_obj': 'synthetic -> synthetic'}]
    """

    def name(image: Any) -> str:
        return Path(str(getattr(image, "meta", {}).get("filename_or_obj", "synthetic"))).name

    return [{"filename_or_obj": f"{name(item['moving'])} -> {name(item['fixed'])}"} for item in batch]


def pair_sampler(dataset: Sized, num_samples: int, seed: int = 0) -> RandomSampler:
    """Draw pairs at random, with replacement, for training.

    Args:
        dataset: any dataset with a length.
        num_samples: items per epoch.
        seed: seed of the sampler's own generator, which goes on from epoch to epoch; in multi-process training give
            each process its own.

    Raises:
        ValueError: if `num_samples` is not positive.

    Example:
        >>> list(pair_sampler(range(100), 3, seed=0)) == list(pair_sampler(range(100), 3, seed=0))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return RandomSampler(dataset, replacement=True, num_samples=num_samples, generator=generator)
