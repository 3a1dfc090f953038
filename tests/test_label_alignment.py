"""Label maps are brought onto each other by the map that made them differ, whatever their grids."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from equireg.fields import warp
from equireg.label_alignment import AlignLabelsd, label_centers
from equireg.networks.affine import affine_ddf

PLACES = {
    1: (0.25, 0.3, 0.6),
    2: (0.3, 0.7, 0.3),
    3: (0.7, 0.25, 0.35),
    4: (0.72, 0.7, 0.7),
    5: (0.5, 0.5, 0.5),
    6: (0.5, 0.2, 0.75),
    9: (0.25, 0.5, 0.8),
}


def balls(shape: tuple[int, ...]) -> torch.Tensor:
    """Six balls of labels 1 to 6, and one of label 9, `(1, *shape)`."""
    at = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in shape), indexing="ij"))
    labels = torch.zeros(1, *shape, dtype=torch.int16)
    for label, place in PLACES.items():
        center = torch.tensor([size * share for size, share in zip(shape, place)]).reshape(-1, *[1] * len(shape))
        labels[0, (at - center).square().sum(dim=0) < 16] = label
    return labels


@pytest.mark.parametrize("dims", [2, 3])
def test_a_known_map_is_undone(dims: int) -> None:
    reference = balls((40, 44, 36)[:dims])
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims, :dims] += 0.1 * torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    matrix[:dims, dims] = torch.tensor([3.0, -2.0, 4.0][:dims])
    ddf = affine_ddf(torch.linalg.inv(matrix)[None], [46, 45, 44][:dims]).float()
    moved = warp(reference[None], ddf, mode="nearest", padding="zeros")[0]
    item = {"image": MetaTensor(moved), "other": moved}
    out = AlignLabelsd("image", reference, 6)(item)
    assert out["image"].shape == reference.shape and out["image"].dtype == torch.int16
    assert isinstance(out["image"], MetaTensor) and out["other"] is moved and item["image"].shape == moved.shape
    same = (out["image"].as_tensor() == reference)[reference > 0]
    before = (moved[(slice(None), *[slice(0, size) for size in reference.shape[1:]])] == reference)[reference > 0]
    assert same.float().mean() > 0.9 > 0.5 > before.float().mean()


def test_centers_of_labels_that_are_large_enough() -> None:
    labels = balls((40, 44))
    labels[0, 0, :3] = 2  # two pieces count as one label
    labels[0, -1, :3] = -1  # nothing
    centers, found = label_centers(labels, 7)
    assert found.tolist() == [True] * 6 + [False], "7 is not there, and 9 beyond the count"
    for label in range(1, 7):
        assert centers[label - 1].tolist() == pytest.approx(
            (labels[0] == label).nonzero().double().mean(dim=0).tolist()
        )
    assert not label_centers(labels, 7, least=10**4)[1].any()


def test_too_few_labels_are_refused() -> None:
    reference = balls((40, 44))
    few = torch.where(reference > 2, 0, reference)
    with pytest.raises(ValueError, match="at least 3 labels in both label maps, found 2"):
        AlignLabelsd("image", reference, 6)({"image": few})
    assert AlignLabelsd("image", reference, 6, allow_missing_keys=True)({}) == {}
