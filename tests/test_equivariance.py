"""What the project promises about moves of its images, kept by measurement; and the tool that measures it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from helpers_networks import SMALL, blocks, content, place, randomized, sharpened, spread
from monai.networks.nets import UNet
from torch import nn

from equireg.equivariance import (
    SIDES,
    TOLERANCE,
    Cropped,
    EquivarianceError,
    assert_equivariant,
    content_sensitivity,
    equivariance_error,
    error_map,
    expected_ddf,
)
from equireg.fields import identity_grid
from equireg.moves import AffineMove, rotation, smooth_warp, still, translation, turn_angle
from equireg.networks import CARL, CoordinateAttention, DisplacementUNet, TwoStep

DTYPES = [torch.float32, torch.float64]
SIZES = {2: ((11, 9), (10, 12)), 3: ((7, 6, 8), (8, 7, 6))}  # of moving and fixed content
CANVAS = {2: ((22, 24), (21, 23)), 3: ((15, 14, 16), (16, 15, 13))}
AT = {2: ((4, 9), (5, 2)), 3: ((4, 4, 4), (5, 6, 3))}
FACTOR = 4
# Moves of the moving content: its new canvas, and how it moves on it. The first ones are multiples of the factor.
MULTIPLES = {
    2: [((22, 24), (4, -8)), ((22, 24), (-4, 0)), ((23, 24), (8, 4)), ((35, 30), (20, 12))],
    3: [((15, 14, 16), (4, 4, 4)), ((15, 14, 16), (-4, -4, -4)), ((15, 18, 20), (0, 8, 8))],
}
CANVASES = {
    2: [((30, 41), (0, 0)), ((15, 18), (0, 0)), ((11, 9), (-4, -9)), ((47, 20), (19, 2))],
    3: [((20, 14, 21), (0, 0, 0)), ((7, 6, 8), (-4, -4, -4)), ((11, 10, 12), (0, 0, 0))],
}
ANY = {
    2: [((22, 24), (1, 0)), ((22, 24), (7, 6)), ((22, 24), (-4, -9)), ((22, 24), (-3, 5)), ((30, 30), (13, 11))],
    3: [((15, 14, 16), (1, -2, 3)), ((15, 14, 16), (-4, 4, -3)), ((18, 17, 19), (7, 6, 5))],
}
# Where moving and fixed content go, at once, on canvases as they are.
BOTH = {
    2: [((0, 0), (3, 5)), ((-3, 2), (-5, 9)), ((7, 6), (6, -2)), ((5, -9), (5, -1))],
    3: [((0, 0, 0), (2, -3, 1)), ((-4, 3, 4), (3, 2, 4))],
}
TURNS = {2: [90, 180, 270], 3: [90]}


def network(kind: str, dims: int, dtype: torch.dtype, **options) -> nn.Module:
    if kind == "attention":
        return randomized(CoordinateAttention(dims, 1, 8, **options), dtype)
    return randomized(CARL(dims, nesting=kind, factor=FACTOR, **SMALL, **options), dtype)


def pair(dims: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    values = [content(*size, seed=k, dtype=dtype) for k, size in enumerate(SIZES[dims])]
    return [place(*args) for args in zip(values, CANVAS[dims], AT[dims])]


def largest(net, moving, fixed, move_moving=None, move_fixed=None, ddf=None) -> float:
    """Return the largest error where the law says something, and see to it that it does nearly everywhere."""
    errors = error_map(net, moving, fixed, move_moving, move_fixed, ddf)
    known = ~errors.isnan()
    assert known.all() if move_fixed is None else known.any()
    return errors[known].max().item()


# ---- the exactness table: random weights, eval mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["attention", "deck", "right", "left"])
@pytest.mark.parametrize("dims", [2, 3])
def test_moving_content_moved_or_its_canvas_changed(dims: int, kind: str, dtype: torch.dtype) -> None:
    net, (moving, fixed) = network(kind, dims, dtype), pair(dims, dtype)
    ddf = net(moving, fixed).detach()
    assert spread(ddf) > 0.4, "an answer that sends all to one place is exact for free"
    for canvas, by in MULTIPLES[dims] + CANVASES[dims] + ANY[dims]:
        assert largest(net, moving, fixed, translation(by, canvas), ddf=ddf) < TOLERANCE[dtype], (canvas, by)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["attention", "deck"])
@pytest.mark.parametrize("dims", [2, 3])
def test_either_content_moved_through_the_inferer(dims: int, kind: str, dtype: torch.dtype) -> None:
    net, (moving, fixed) = Cropped(network(kind, dims, dtype)), pair(dims, dtype)
    for by_moving, by_fixed in BOTH[dims]:
        moves = translation(by_moving, CANVAS[dims][0]), translation(by_fixed, CANVAS[dims][1])
        assert largest(net, moving, fixed, *moves) < TOLERANCE[dtype], (by_moving, by_fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["attention", "deck"])
@pytest.mark.parametrize("dims", [2, 3])
def test_either_image_turned_at_the_attention_stage(dims: int, kind: str, dtype: torch.dtype) -> None:
    net = network(kind, dims, dtype, rotation_group="grid")
    values = [blocks(*size, seed=k, dtype=dtype) for k, size in enumerate(SIZES[dims])]
    moving, fixed = (place(v, [n + 3 for n in v.shape[2:]], (1, 3, 2)[:dims]) for v in values)
    stage = sharpened(net if kind == "attention" else net.attention_stage(), moving, fixed)
    assert spread(stage(moving, fixed).detach()) > {2: 0.5, 3: 0.05}[dims], "all to one place turns trivially"
    for degrees in TURNS[dims]:
        matrix = turn_angle(degrees, dims, (0, dims - 1))
        assert largest(stage, moving, fixed, rotation(matrix, moving.shape[2:])) < TOLERANCE[dtype]
        assert largest(stage, moving, fixed, None, rotation(matrix, fixed.shape[2:])) < TOLERANCE[dtype]


def test_content_that_leaves_the_canvas_is_not_exact() -> None:
    """The condition is needed: cut content is other content."""
    net, (moving, fixed) = network("deck", 2, torch.float64), pair(2, torch.float64)
    assert largest(net, moving, fixed, translation((10, 0), CANVAS[2][0])) > 0.01


def test_turns_of_content_no_thicker_than_a_block_are_not_exact() -> None:
    net = network("deck", 2, torch.float64, rotation_group="grid")
    moving = place(blocks(9, 13, dtype=torch.float64), (20, 22), (4, 5))
    for thickness, exact in ((9, True), (3, False)):
        fixed = place(blocks(thickness, 12, seed=1, dtype=torch.float64), (20, 20), (5, 4))
        turned = rotation(turn_angle(90, 2), fixed.shape[2:])
        error = largest(sharpened(net.attention_stage(), moving, fixed), moving, fixed, None, turned)
        assert (error < 1e-8) if exact else (error > 0.1)


def test_answers_that_are_no_numbers_do_not_pass() -> None:
    images = content(9, 8), content(9, 8, seed=1)

    def nothing(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 2, *fixed.shape[2:]), torch.nan)

    def partly(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(1, 2, *fixed.shape[2:])
        ddf[..., 12, 12] = torch.nan
        return ddf

    for net in (nothing, partly):
        errors = equivariance_error(net, *images, kinds=["translation"], sides=["both"])
        assert errors == {"translation of both": float("inf")}
        with pytest.raises(AssertionError):
            assert_equivariant(net, *images, kinds=["translation"], sides=["both"], least_change=0)


def test_binary_masks_show_whether_a_network_looks() -> None:
    masks = [place((content(9, 8, seed=k) > 0).float(), (14, 14), (2, 3)) for k in range(2)]
    assert content_sensitivity(network("attention", 2, torch.float32), *masks) > 0


def test_background_other_than_zero_is_not_exact() -> None:
    """So is the background: where it is noise, the canvas is the content, and moves of something within it are not."""
    net, (moving, fixed) = network("deck", 2, torch.float64), pair(2, torch.float64)
    noise = 0.05 * torch.rand(*moving.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    move = translation((3, 2), CANVAS[2][0])
    moved = move.image(moving)
    expected, _ = expected_ddf(net(moving + noise, fixed), move, still(CANVAS[2][1]))
    assert (net(moved + noise * (moved == 0), fixed) - expected).abs().max() > 0.1


# ---- what no network can do, and what a useless one can


def test_no_network_obeys_the_whole_law() -> None:
    """Two images of zeros look the same however they move, and the law demands another answer for each move."""
    zeros = torch.zeros(1, 1, 9, 8)
    move = translation((2, 0), (9, 8))
    assert torch.equal(move.image(zeros), zeros)
    for net in (network("deck", 2, torch.float32), randomized(DisplacementUNet(2, channels=(4, 8)))):
        # Whatever it answers before, it answers after: the error is the move itself.
        torch.testing.assert_close(error_map(net, zeros, zeros, move), torch.full((1, 9, 8), 2.0, dtype=torch.float64))
    assert largest(network("deck", 2, torch.float32), zeros, zeros, move, move) == 0.0


class Centroid(nn.Module):
    """Move the center of mass of one image onto the other's."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        def center(image: torch.Tensor) -> torch.Tensor:
            grid = identity_grid(list(image.shape[2:]), image.dtype)
            return (grid * image).flatten(2).sum(dim=2) / image.flatten(2).sum(dim=2)

        by = center(moving) - center(fixed)
        return by.reshape(*by.shape, *[1] * by.shape[1]).expand(*by.shape, *fixed.shape[2:])


def test_a_network_that_only_answers_centroids_does_not_pass() -> None:
    moving, fixed = pair(2, torch.float64)
    assert max(equivariance_error(Centroid(), moving, fixed, kinds=["translation"]).values()) < 1e-8
    with pytest.raises(AssertionError, match="hardly changes .* outline, not what it is"):
        assert_equivariant(Centroid(), moving, fixed)


@pytest.mark.parametrize("kind", ["attention", "deck", "right", "left"])
def test_ours_look_at_the_content(kind: str) -> None:
    assert content_sensitivity(network(kind, 2, torch.float32), *pair(2)) > 0.5


# ---- the tool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_assert_on_the_whole_network_as_files_use_it(dims: int, dtype: torch.dtype, caplog) -> None:
    net = network("deck", dims, dtype)
    with caplog.at_level(logging.INFO):
        errors = assert_equivariant(Cropped(net), *pair(dims, dtype), trials=1, max_shift=3)
    assert list(errors) == [f"translation of {side}" for side in SIDES]
    assert "translation of moving" in caplog.text
    with pytest.raises(AssertionError, match="not equivariant to 1e-20 voxel: translation of moving"):
        assert_equivariant(net, *pair(dims, dtype), trials=1, max_shift=3, tolerance=1e-20)


def test_it_tells_a_displacement_network_from_a_registration() -> None:
    """[U,U] to multiples of its stride, as long as nothing touches the border; never [W,U]."""
    net = randomized(DisplacementUNet(2, channels=(4, 8)), torch.float64)
    moving, fixed = (place(content(6, 6, seed=k, dtype=torch.float64), (56, 56), (24, 24)) for k in (0, 1))
    move = translation((4, -8), (56, 56))
    errors = error_map(net, moving, fixed, move, move)[0, 16:-16, 16:-16]
    assert errors.max() < 1e-12
    assert (
        equivariance_error(net, moving, fixed, kinds=["translation"], sides=["independent"])[
            "translation of independent"
        ]
        > 1.0
    )


def test_it_measures_networks_of_others_through_a_thin_wrapper() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet(2, 2, 2, channels=(4, 8), strides=(2,), norm="batch")

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return self.unet(torch.cat([moving, fixed], dim=1))

    moving, fixed = (place(content(8, 8, seed=k), (16, 16), (4, 4)) for k in (0, 1))
    net = Wrapped().train()
    errors = equivariance_error(net, moving, fixed, trials=1)
    assert len(errors) == 12 and errors["translation of moving"] > 1.0
    assert all(module.training for module in net.modules()), "modes are left as they were"


def test_parts_in_other_modes_keep_them() -> None:
    net = TwoStep(DisplacementUNet(2, channels=(4,)).eval(), DisplacementUNet(2, channels=(4,)))
    modes = [module.training for module in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    equivariance_error(net, *pair(2), kinds=["translation"], sides=["moving"], trials=1)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_law_for_moves_of_whole_voxels() -> None:
    """The formulas of the module's docstring, voxel by voxel."""
    ddf = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    stay, s, canvas = still((6, 5)), (2, -1), (6, 5)
    shift = torch.tensor(s, dtype=torch.float64).reshape(1, 2, 1, 1)
    expected, known = expected_ddf(ddf, translation(s, canvas), stay)
    assert known.all() and torch.allclose(expected, ddf + shift)
    expected, known = expected_ddf(ddf, stay, translation(s, canvas))
    assert known.sum() == 4 * 4
    assert torch.allclose(expected[:, :, 2:, :4], ddf[:, :, :4, 1:] - shift)
    turn = turn_angle(90, 2)
    expected, known = expected_ddf(ddf, stay, rotation(turn, (6, 5)))
    assert expected.shape == (1, 2, 5, 6) and known.all()
    center = [torch.tensor([2.5, 2.0]).reshape(2, 1, 1), torch.tensor([2.0, 2.5]).reshape(2, 1, 1)]
    old, new = identity_grid([6, 5], torch.float64)[0], identity_grid([5, 6], torch.float64)[0]
    back = torch.einsum("ij,jxy->ixy", turn.T, new - center[1]) + center[0]
    found = (old + ddf[0])[:, back[0].long(), back[1].long()]
    assert torch.allclose(expected[0], found - new)
    turned, _ = expected_ddf(ddf, rotation(turn, (6, 5)), stay)
    assert torch.allclose(turned[0], torch.einsum("ij,jxy->ixy", turn, old + ddf[0] - center[0]) + center[1] - old)


def test_the_law_reaches_the_border_of_large_canvases() -> None:
    canvas = (700, 3)
    for move in (still(canvas), rotation(turn_angle(180, 2), canvas)):
        assert expected_ddf(torch.zeros(1, 2, *canvas), still(canvas), move)[1].all()


def test_a_registration_that_knows_the_answer_follows_smooth_warps() -> None:
    """Images that are coordinates register exactly: the error left is that of interpolating a smooth field."""

    class Inverse(nn.Module):
        """Find, for each fixed value, the moving voxel with the nearest one: `moving^-1 o fixed`, to half a voxel."""

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            grid = identity_grid(list(moving.shape[2:]), moving.dtype)
            # What a warp brings in from outside is dim, and looks like something else.
            values, points = (x[..., 2:-2, 2:-2].flatten(2) for x in (moving, grid))
            nearest = torch.cdist(fixed.flatten(2).transpose(1, 2), values.transpose(1, 2)).argmin(dim=2)
            return points[:, :, nearest[0]].reshape(grid.shape) - grid

    image = identity_grid([24, 24], torch.float64) + 1.0
    warp = smooth_warp((24, 24), 0.6, np.random.default_rng(1))
    error = error_map(Inverse(), image, image, warp, None)[0, 4:-4, 4:-4]
    assert error.max() < 1.0
    lazy = error_map(lambda m, f: torch.zeros(1, 2, 24, 24), image, image, warp, None)[0, 4:-4, 4:-4]
    assert lazy.max() > 1.2


def test_metric_averages_over_pairs() -> None:
    net = network("deck", 2, torch.float32)
    moving, fixed = (torch.cat([image, image.flip(2)]) for image in pair(2))
    metric = EquivarianceError(net, side="moving", max_shift=3)
    assert metric(moving, fixed).shape == (2, 1)
    metric(list(moving), list(fixed))
    assert metric.aggregate().item() < 1e-3
    unet = EquivarianceError(randomized(DisplacementUNet(2, channels=(4, 8))), side="moving", max_shift=3)
    unet(moving, fixed)
    assert unet.aggregate().item() > 1.0
    with pytest.raises(ValueError, match="moving and the fixed images, got no y"):
        metric(moving)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["scaling"]}, "kinds must be some of translation, rotation, warp, got"),
        ({"kinds": "translation"}, "kinds must be some of"),
        ({"sides": []}, "sides must be some of moving, fixed, both, independent"),
        ({"trials": 0}, "at least 1, got 0 and 8"),
        ({"max_shift": 0}, "at least 1, got 3 and 0"),
    ],
)
def test_it_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equivariance_error(Centroid(), *pair(2), **options)


def test_it_wants_a_tolerance_for_the_type() -> None:
    moving, fixed = (image.to(torch.float16) for image in pair(2))
    with pytest.raises(ValueError, match=r"no tolerance for torch.float16, expected one of torch.float32"):
        assert_equivariant(Centroid(), moving, fixed)


def test_errors_are_distances() -> None:
    stretched = AffineMove(2.0 * torch.eye(2).double(), torch.tensor([3.0, 4.0]).double(), (4, 4))
    image = torch.ones(1, 1, 4, 4)
    errors = error_map(lambda m, f: torch.zeros(1, 2, 4, 4), image, image, stretched)
    assert errors[0, 0, 0].item() == 5.0 and errors[0, 1, 0].item() == pytest.approx(np.hypot(4, 4))
