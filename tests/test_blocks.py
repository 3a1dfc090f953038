"""Working block by block against working on the whole."""

from __future__ import annotations

import pytest
import torch

from equireg import blocks
from equireg.blocks import mapped_indices, sample, sample_scattered, spaced_voxels
from equireg.fields import identity_grid, warp

SHAPES = [(41, 3), (1, 17), (13, 1, 7), (5, 17, 33)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("voxels", [1, 60, 2**15])
def test_blocks_hold_every_voxel_once(shape: tuple[int, ...], voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_VOXELS", voxels)
    seen, expected = torch.zeros(1, *shape), identity_grid(list(shape), torch.float64)[0]
    for where in blocks.blocks(shape):
        seen[where] += 1
        index = blocks.block_indices(where)
        assert torch.equal(index, expected[where]) and index[0].numel() <= 2 * voxels
    assert (seen == 1).all()
    ddf = random(len(shape), *shape)
    assert torch.equal(mapped_indices(shape, lambda index, where: index + ddf[where]), ddf.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_sample_is_that_of_the_whole_image(shape: tuple[int, ...], mode: str, padding: str) -> None:
    """Also where some positions, or all, lie outside."""
    dims = len(shape)
    image = random(2, *shape)
    grid = [4, 5, 6][:dims]
    for spread, shift in [(3.0, 0.0), (90.0, -20.0), (1.0, -70.0), (1.0, 70.0)]:
        position = spread * random(dims, *grid, seed=1) + shift
        ddf = position - identity_grid(grid, torch.float64)[0]
        expected = warp(image[None], ddf[None], mode, padding)[0]
        torch.testing.assert_close(sample(image, position, mode, padding), expected, rtol=0, atol=1e-12)
        if mode == "linear" and padding == "border":
            scattered = sample_scattered(image, position.flatten(1))
            torch.testing.assert_close(scattered, expected.flatten(1), rtol=0, atol=1e-12)


def test_stray_points_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    image, position = random(2, 30, 31, 32), 3 * random(3, 5, 6, 7, seed=1)
    position[:, 2, 3, 4] = 28.0
    expected = sample(image, position, padding="zeros")
    read = []
    monkeypatch.setattr(blocks, "_READ", 500)
    monkeypatch.setattr(blocks, "warp", lambda crop, *rest: (read.append(crop[0, 0].numel()), warp(crop, *rest))[1])
    torch.testing.assert_close(sample(image, position, padding="zeros"), expected, rtol=0, atol=1e-12)
    assert max(read) <= 500 and len(read) < 20


def test_few_points_far_apart_do_not_have_all_between_them_read(monkeypatch: pytest.MonkeyPatch) -> None:
    image, read = random(2, 30, 31, 32), []
    position = 40.0 * random(3, 20, 1, 1, seed=1) - 4.0  # some outside
    expected = warp(image[None], (position - identity_grid([20, 1, 1], torch.float64)[0])[None])[0]
    monkeypatch.setattr(blocks, "warp", lambda crop, *rest: (read.append(crop[:, 0].numel()), warp(crop, *rest))[1])
    torch.testing.assert_close(sample(image, position), expected, rtol=0, atol=1e-12)
    assert read == [20 * 8]


def test_outside_is_the_background() -> None:
    image, position = torch.full((1, 2, 2), 5.0), torch.tensor([[[0.0, -0.5, -3.0]], [[0.0, 0.0, 0.0]]]).double()
    assert sample(image, position, padding="zeros", outside=-1.0).tolist() == [[[5.0, 2.0, -1.0]]]
    assert image.unique().tolist() == [5.0]


def test_undefined_positions_harm_no_other() -> None:
    image, position = random(1, 6, 7), 4 * random(2, 3, 3, seed=1)
    broken = position.clone()
    broken[:, 1, 1] = torch.nan
    expected = sample(image, position)
    found = sample(image, broken)
    torch.testing.assert_close(found.flatten()[:4], expected.flatten()[:4], rtol=0, atol=1e-12)
    scattered = sample_scattered(image, broken.flatten(1)).flatten()
    torch.testing.assert_close(scattered[5:], expected.flatten()[5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1, 7, 100, 10**6])
def test_spaced_voxels_are_every_nth_of_the_mask(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_VOXELS", 31)
    mask = random(1, 11, 13, 17) > 0.4
    inside = mask.flatten().nonzero()[:, 0]
    expected = inside[:: -(-len(inside) // most)]
    assert torch.equal(spaced_voxels((11, 13, 17), mask, most), expected) and len(expected) <= most
    assert len(spaced_voxels((4, 4), torch.zeros(4, 4), most)) == 0
    assert spaced_voxels((4, 4), None, most).tolist() == list(range(0, 16, -(-16 // most)))
