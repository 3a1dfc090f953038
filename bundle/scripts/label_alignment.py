"""Bring label maps of different people onto each other: what is left to learn is what no affine map can do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import TransformBackends

from .fields import identity_grid, warp
from .networks.affine import affine_ddf
from .transforms import _plain, _with_meta

__all__ = ["AlignLabelsd", "label_centers"]


def label_centers(labels: torch.Tensor, count: int, least: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each label lies.

    Args:
        labels: `(1, *shape)`, whole numbers.
        count: labels are 1 to this number.
        least: voxels that a label needs to be found.

    Returns:
        The mean index of each label `(count, D)`, float64, and whether it was found, `(count,)`.

    Example:
        >>> centers, found = label_centers(torch.tensor([[[1, 1, 0, 2]]]), 3, least=1)
        >>> centers[:2].tolist(), found.tolist()
        ([[0.0, 0.5], [0.0, 3.0]], [True, True, False])
    """
    flat = labels[0].flatten().long()
    flat = torch.where((flat > 0) & (flat <= count), flat, 0)
    at = identity_grid(list(labels.shape[1:]), torch.float64)[0].flatten(1)
    sizes = torch.bincount(flat, minlength=count + 1)
    sums = torch.stack([torch.bincount(flat, weights=axis, minlength=count + 1) for axis in at], dim=1)
    return (sums / sizes.clamp(min=1).unsqueeze(1))[1:], sizes[1:] >= least


class AlignLabelsd(MapTransform):
    """Move label maps onto a reference by the affine map that fits the centers of their labels best.

    Least squares over the labels that both have; one nearest-neighbor sampling. Metadata stay: what comes out is for
    training, not for going back.

    Args:
        keys: label maps `(1, *shape)`.
        reference: the label map `(1, *shape)` onto whose grid they are brought.
        count: labels are 1 to this number; others move along.
        allow_missing_keys: skip keys that are not there.

    Raises:
        ValueError: when called, if fewer labels than an affine map needs are found in both.

    Example:
        >>> labels = torch.zeros(1, 12, 12)
        >>> for k, (i, j) in enumerate([(1, 1), (1, 6), (6, 1), (5, 6)]): labels[0, i : i + 5, j : j + 4] = k + 1
        >>> moved = {"image": labels.roll(1, dims=1)}
        >>> bool((AlignLabelsd("image", labels, 4)(moved)["image"] == labels).all())
        True
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, keys: KeysCollection, reference: torch.Tensor, count: int, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        reference = _plain(reference)
        self.shape, self.count = list(reference.shape[1:]), count
        self.centers, self.found = label_centers(reference, count)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with the label maps moved."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = _plain(item[key])
            matrix = self._map(labels)
            ddf = affine_ddf(matrix.unsqueeze(0), self.shape).float()
            moved = warp(labels.unsqueeze(0), ddf, mode="nearest", padding="zeros")[0]
            item[key] = _with_meta(moved, item[key])
        return item

    def _map(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the map from indices of the reference to those of a label map, `(D + 1, D + 1)`, float64."""
        centers, found = label_centers(labels, self.count)
        both, dims = found & self.found, len(self.shape)
        if int(both.sum()) <= dims:
            raise ValueError(
                f"AlignLabelsd expects at least {dims + 1} labels in both label maps, found {int(both.sum())}."
            )
        known = torch.cat([self.centers[both], torch.ones(int(both.sum()), 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(known, centers[both], driver="gelsd").solution
        bottom = torch.eye(dims + 1, dtype=torch.float64)[dims:]
        return torch.cat([solution.T, bottom])
