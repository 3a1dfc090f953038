"""Datasets of pairs: of subjects from a flat list, of warped images, or of synthetic anatomy.

An item holds `moving` and `fixed`, and `moving_label` and `fixed_label` where both subjects have a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset
from torch.utils.data import RandomSampler

from .augmentation import RandWarpPaird
from .synthesis import KINDS, synthetic_pair

__all__ = [
    "PairDataset",
    "PairSampler",
    "SyntheticPairDataset",
    "WarpedPairDataset",
    "ordered_pair",
    "pair_dataset",
]

TransformLike = Callable[[Any], Any] | Sequence[Callable[[Any], Any]]


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

    Pair `k` is `ordered_pair(k, N)` of the `N (N - 1)` there are. Draw from them with `PairSampler` to train, or fix a
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
        self.warp, self.seed = deepcopy(warp), seed  # a copy, because every item seeds it anew

    def _pair(self, index: int) -> dict[str, Any]:
        self.warp.set_random_state(state=np.random.RandomState([self.seed, index]))
        item: dict[Any, Any] = self.warp(deepcopy(self.subjects[index % len(self.data)]))
        return item


def pair_dataset(
    data: Sequence[Mapping[str, Any]] | None = None,  # configs leave out what is None, here and below
    load: TransformLike | None = None,
    transform: TransformLike | None = None,
    spatial_dims: int = 3,
    shape: int | Sequence[int] = 48,
    num_pairs: int | None = None,
    seed: int = 0,
    max_shift: int | Sequence[int] | None = None,
    kind: str = "labels",
    cache_rate: float = 1.0,
    runtime_cache: bool | str = True,
    require_labels: bool = False,
) -> PairDataset | SyntheticPairDataset:
    """Make the dataset of a config: pairs of the given subjects, or of synthetic anatomy if no list is given.

    Args:
        data: flat list of subjects; None for synthetic data. A host may hand over an empty list: that is an error.
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
        require_labels: refuse subjects without a label, because the pairs are to be scored by overlap.

    Raises:
        ValueError: as the two dataset classes; and for a subject without the label that is required.

    Example:
        >>> len(pair_dataset(spatial_dims=2, shape=40, num_pairs=8))
        8
    """
    if data is not None:
        unlabeled = [subject for subject in data if require_labels and subject.get("label") is None]
        if unlabeled:
            raise ValueError(f"validation scores the overlap of labels, and {unlabeled[0].get('image')} has none.")
        return PairDataset(data, load, transform, num_pairs, seed, cache_rate, runtime_cache)
    length = 1_000_000 if num_pairs is None else num_pairs
    return SyntheticPairDataset(spatial_dims, shape, length, seed, transform, max_shift, kind)


class PairSampler(RandomSampler):
    """Draw pairs at random, with replacement, for training; a checkpoint can carry the state of the draw.

    Processes that train together draw the same and take turns, so that their batches are together the batch that one
    process would get, and one checkpoint serves all.

    Args:
        dataset: any dataset with a length.
        num_samples: items per epoch and process.
        seed: seed of the sampler's own generator, which goes on from epoch to epoch; the same for all processes.
        rank: number of this process, from 0.
        num_replicas: number of processes that share the draw.

    Raises:
        ValueError: if `num_samples` is not positive.

    Example:
        >>> whole = list(PairSampler(range(100), 6))
        >>> list(PairSampler(range(100), 3, rank=1, num_replicas=2)) == whole[1::2]
        True
    """

    def __init__(self, dataset: Sized, num_samples: int, seed: int = 0, rank: int = 0, num_replicas: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(dataset, replacement=True, num_samples=num_samples * num_replicas, generator=generator)
        self.rank, self.num_replicas = rank, num_replicas

    def __iter__(self) -> Iterator[int]:
        """Draw for all processes, and hand out this one's share."""
        return islice(super().__iter__(), self.rank, None, self.num_replicas)

    def __len__(self) -> int:
        return super().__len__() // self.num_replicas

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of the generator: between two epochs, what decides all further draws."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on drawing from a state that `state_dict` returned."""
        self.generator.set_state(state["generator"])
