"""Moves of content: images and points go the same way, whole-voxel moves copy, and every move has its way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_networks import content, place

from equireg.fields import identity_grid
from equireg.moves import WarpMove, read_at, rotation, smooth_warp, still, translation, turn_angle
from equireg.networks.rotation import rotation_group, turn, turn_matrix

SHAPE = {2: (7, 10), 3: (5, 6, 4)}


def image(dims: int, channels: int = 1) -> torch.Tensor:
    return place(content(*[n - 2 for n in SHAPE[dims]], channels=channels), SHAPE[dims], [1] * dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_translation_copies_values(dims: int) -> None:
    old = image(dims, channels=2)
    by = (2, -1, 3)[:dims]
    canvas = [n + 4 for n in SHAPE[dims]]
    move = translation(by, canvas)
    assert move.exact
    assert torch.equal(move.image(old), place(old[(..., *[slice(1, -1)] * dims)], canvas, [1 + b for b in by]))


@pytest.mark.parametrize("dims", [2, 3])
def test_grid_rotations_are_turns_of_the_array(dims: int) -> None:
    old = image(dims)
    for perm, signs in rotation_group(dims, "grid"):
        move = rotation(turn_matrix(perm, signs), SHAPE[dims])
        assert move.exact
        assert torch.equal(move.image(old), turn(old, perm, signs))


def test_a_quarter_turn_is_numpys() -> None:
    old = image(2)
    assert torch.equal(rotation(turn_angle(90, 2), SHAPE[2]).image(old), torch.rot90(old, 1, [2, 3]))
    assert torch.equal(rotation(turn_angle(180, 2), SHAPE[2]).image(old), torch.rot90(old, 2, [2, 3]))


MOVES = {
    "still": lambda: still((7, 10)),
    "translation": lambda: translation([1.5, -2], (9, 9)),
    "turn": lambda: rotation(turn_angle(37, 2), (7, 10), (12, 13)),
    "warp": lambda: smooth_warp((7, 10), 0.3, np.random.default_rng(0), points=3),
}


@pytest.mark.parametrize("name", MOVES)
def test_points_come_back(name: str) -> None:
    move = MOVES[name]()
    points = identity_grid([7, 10], torch.float64)
    torch.testing.assert_close(move.to_old(move.to_new(points)), points, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MOVES)
def test_values_travel_with_points(name: str) -> None:
    """A linear image is interpolated without error: what a moved voxel shows is what lies at its old place."""
    move = MOVES[name]()
    slope = torch.tensor([0.7, -0.3], dtype=torch.float64).reshape(1, 2, 1, 1)
    old = (identity_grid([7, 10], torch.float64) * slope).sum(dim=1, keepdim=True) + 9.0
    came_from = move.to_old(identity_grid(list(move.shape), torch.float64))
    inside = ((came_from >= 0) & (came_from <= torch.tensor([6.0, 9.0]).reshape(1, 2, 1, 1))).all(dim=1, keepdim=True)
    expected = (came_from * slope).sum(dim=1, keepdim=True) + 9.0
    assert inside.sum() > 20
    torch.testing.assert_close(move.image(old)[inside], expected[inside], rtol=0, atol=1e-9)


def test_background_stays_background_and_labels_stay_labels() -> None:
    old = place(content(3, 4), (9, 9), (3, 3))
    turned = rotation(turn_angle(30, 2), (9, 9)).image(old)
    assert 6 <= (turned != 0).sum() <= 18 and (turned[..., 0, :] == 0).all()
    labels = (old > 0).to(torch.uint8) * 7
    assert set(rotation(turn_angle(30, 2), (9, 9)).image(labels).unique().tolist()) == {0, 7}


def test_reading_a_field_broadcasts_the_batch() -> None:
    ddf = torch.cat([identity_grid([4, 5]), 2 * identity_grid([4, 5])]).double()
    points = torch.full((1, 2, 3, 1), 1.25, dtype=torch.float64)
    assert read_at(ddf, points)[:, 0, 0, 0].tolist() == [1.25, 2.5]


def test_a_warp_continues_outside_its_canvas() -> None:
    move = WarpMove(torch.full((1, 2, 4, 4), 0.5, dtype=torch.float64))
    far = torch.full((1, 2, 1, 1), 20.0, dtype=torch.float64)
    assert move.to_old(far).flatten().tolist() == [20.5, 20.5]
    assert move.to_new(far).flatten().tolist() == [19.5, 19.5]
