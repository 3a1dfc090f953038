"""The inferer: answers that follow every whole-voxel move of either image exactly, and clear refusals."""

from __future__ import annotations

import math
from math import inf, nan
from typing import Any

import pytest
import torch
from helpers_networks import SMALL, content, moved_field, place, randomized, vector

from equireg.fields import warp
from equireg.inferer import RegistrationInferer
from equireg.metrics import folding_fraction
from equireg.networks import CARL, PairNetwork
from equireg.networks.affine import affine_ddf
from equireg.optimization import FieldOptimization, NetworkOptimization

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # voxels
SIZES = {2: ((9, 11), (10, 8)), 3: ((7, 9, 8), (8, 7, 7))}  # of moving and fixed content
OLD = {2: (21, 23), 3: (16, 17, 15)}
NEW = {2: (26, 22), 3: (17, 19, 16)}
# Where the contents lie on the old and the new canvas: inside, touching the first and last voxels, odd and even moves.
MOVES = {
    2: [
        (((6, 5), (4, 7)), ((9, 6), (11, 2))),
        (((3, 2), (5, 5)), ((0, 0), (16, 14))),
        (((12, 12), (0, 0)), ((17, 0), (3, 14))),
        (((5, 5), (5, 5)), ((6, 5), (5, 5))),
        (((5, 5), (5, 5)), ((5, 5), (5, 8))),
    ],
    3: [
        (((4, 3, 2), (5, 6, 4)), ((7, 4, 5), (2, 7, 9))),
        (((9, 8, 7), (1, 2, 3)), ((0, 10, 0), (9, 12, 9))),
    ],
}
CASES = [(dims, *case) for dims, cases in MOVES.items() for case in cases]


def network(dims: int, dtype: torch.dtype = torch.float32, nesting: str = "deck") -> PairNetwork:
    return PairNetwork(randomized(CARL(dims, nesting=nesting, **SMALL), dtype)).eval()


def images(dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    moving, fixed = (content(*size, seed=seed + k, dtype=dtype) for k, size in enumerate(SIZES[dims]))
    return moving, fixed


# ---- exactness


@pytest.mark.parametrize("margin", [0, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dims", "before", "after"), CASES)
def test_answer_follows_whole_voxel_moves_of_either_image(
    dims: int, before: tuple, after: tuple, dtype: torch.dtype, margin: int
) -> None:
    net, infer = network(dims, dtype), RegistrationInferer(margin)
    moving, fixed = images(dims, dtype)
    by_moving, by_fixed = ([n - o for n, o in zip(after[k], before[k])] for k in (0, 1))
    with torch.no_grad():
        old = infer(torch.cat([place(moving, OLD[dims], before[0]), place(fixed, OLD[dims], before[1])], 1), net)
        new = infer(torch.cat([place(moving, NEW[dims], after[0]), place(fixed, NEW[dims], after[1])], 1), net)
    ddf = old[:, :dims]
    expected = moved_field(ddf, NEW[dims], by_fixed) + vector(by_moving, ddf) - vector(by_fixed, ddf)
    # Only voxels whose old position lies on the old canvas have an old answer.
    known = torch.zeros(NEW[dims], dtype=torch.bool)
    known[tuple(slice(max(s, 0), s + size) for s, size in zip(by_fixed, OLD[dims]))] = True
    assert known.float().mean() > 0.1
    assert (new[:, :dims] - expected).abs()[..., known].max() < TOLERANCE[dtype]
    # The answer is far from one vector, so that the test can tell.
    assert ddf.flatten(2).std(dim=2).min() > 0.05


@pytest.mark.parametrize("nesting", ["right", "left"])
def test_other_nestings_are_exact_too(nesting: str) -> None:
    net, infer = network(2, torch.float64, nesting), RegistrationInferer()
    moving, fixed = images(2, torch.float64)
    with torch.no_grad():
        old = infer(place(moving, (20, 20), (3, 4)), net, fixed=place(fixed, (18, 17), (2, 1)))
        new = infer(place(moving, (25, 30), (8, 11)), net, fixed=place(fixed, (18, 17), (2, 1)))
    assert (new[:, :2] - old[:, :2] - vector((5, 7), old)).abs().max() < 1e-8
    assert (new[:, 2:] - old[:, 2:]).abs().max() < 1e-8  # the moved image stays


def test_contents_alone_decide_and_no_canvas_is_needed() -> None:
    net, infer = network(2, torch.float64), RegistrationInferer()
    moving, fixed = images(2, torch.float64)
    with torch.no_grad():
        bare = infer(moving, net, fixed=fixed)
        wide = infer(place(moving, (40, 37), (11, 20)), net, fixed=fixed)
    assert (wide[:, :2] - bare[:, :2] - vector((11, 20), bare)).abs().max() < 1e-8


# ---- optimization


@pytest.mark.parametrize(
    ("dims", "before", "after"), [(dims, *case) for dims, cases in MOVES.items() for case in cases[:2]]
)
def test_optimized_answers_follow_whole_voxel_moves_too(dims: int, before: tuple, after: tuple) -> None:
    net, infer = network(dims), RegistrationInferer(optimization=FieldOptimization(steps=3))
    moving, fixed = images(dims)
    by_moving, by_fixed = ([n - o for n, o in zip(after[k], before[k])] for k in (0, 1))
    weight = content(*SIZES[dims][1], seed=9)
    fields = []
    for canvas, (moving_at, fixed_at) in ((OLD[dims], before), (NEW[dims], after)):
        counted, target = place(weight, canvas, fixed_at), place(fixed, canvas, fixed_at)
        fields.append(infer(place(moving, canvas, moving_at), net, fixed=target, weight=counted)[:, :dims])
    old, new = fields
    alone = RegistrationInferer()(place(moving, OLD[dims], before[0]), net, fixed=place(fixed, OLD[dims], before[1]))
    assert (old - alone[:, :dims]).abs().max() > 0.1  # it does something
    expected = moved_field(old, NEW[dims], by_fixed) + vector(by_moving, old) - vector(by_fixed, old)
    known = torch.zeros(NEW[dims], dtype=torch.bool)
    known[tuple(slice(max(s, 0), s + size) for s, size in zip(by_fixed, OLD[dims]))] = True
    assert (new - expected).abs()[..., known].max() < 1e-4


def test_the_network_optimized_follows_moves() -> None:
    net, infer = network(2), RegistrationInferer(optimization=NetworkOptimization(steps=2, learning_rate=1e-3))
    moving, fixed = images(2)
    with torch.no_grad():
        old = infer(moving, net, fixed=fixed)
        new = infer(place(moving, (31, 30), (8, 11)), net, fixed=fixed)
        alone = RegistrationInferer()(moving, net, fixed=fixed)
    assert (new[:, :2] - old[:, :2] - vector((8, 11), old)).abs().max() < 1e-4
    assert (alone - old).abs().max() > 1e-3
    assert torch.equal(old[:, 2:], warp(moving, old[:, :2], padding="zeros"))  # moved by the field that was optimized


def test_optimization_gets_crops_the_network_of_two_images_and_the_answer() -> None:
    net, (moving, fixed) = network(2), images(2)
    weight = content(*fixed.shape[2:], seed=4)
    seen = []

    def record(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(arguments)
        return arguments[3] + 1.0

    canvas, target = place(moving, (30, 32), (7, 9)), place(fixed, (28, 20), (8, 6))
    infer = RegistrationInferer(2, record)
    with torch.no_grad():
        alone = RegistrationInferer(2)(canvas, net, fixed=target)
        pred = infer(canvas, net, fixed=target, weight=place(weight, (28, 20), (8, 6)))
        infer(canvas, net, fixed=target)
    inner, moving_crop, fixed_crop, ddf, weight_crop = seen[0]
    assert inner is net.net and seen[1][4] is None
    assert torch.equal(moving_crop, torch.nn.functional.pad(moving, [2] * 4))
    assert torch.equal(fixed_crop, torch.nn.functional.pad(fixed, [2] * 4))
    assert torch.equal(weight_crop, torch.nn.functional.pad(weight, [2] * 4))
    offset = vector((7 - 8, 9 - 6), ddf)
    assert torch.equal(ddf + offset, alone[:, :2, 6 : 6 + 14, 4 : 4 + 12])
    assert (pred[:, :2] - alone[:, :2] - 1.0).abs().max() < 3 * 8 * torch.finfo(torch.float32).eps  # of up to 8 voxels


def test_answers_in_half_precision_stay_finite() -> None:
    """The number of voxels of the crop does not fit into float16."""

    def half(pair: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 4, *pair.shape[2:]), 0.5, dtype=torch.float16)

    image = place(content(44, 44, 44), (50, 50, 50), (3, 3, 3))
    assert (RegistrationInferer()(image, half, fixed=image)[:, :3] == 0.5).all()


@pytest.mark.parametrize("degrees", [0, 40, 150])
def test_an_affine_answer_goes_on_beyond_the_crop(degrees: float) -> None:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[[1.2 * c, -s, 4.0], [s, 0.8 * c, 9.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)

    def turned(pair: torch.Tensor) -> torch.Tensor:
        return torch.cat([affine_ddf(matrix, list(pair.shape[2:])), pair[:, :1]], dim=1)

    moving, fixed = (place(content(12, 13, dtype=torch.float64), (40, 44), at) for at in ((20, 3), (9, 16)))
    ddf = RegistrationInferer(4)(moving, turned, fixed=fixed)[:, :2]
    # From canvas to crop, through the map, and from the moving crop to its canvas.
    to_crop, from_crop = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    to_crop[:2, 2], from_crop[:2, 2] = torch.tensor([4.0 - 9, 4.0 - 16]), torch.tensor([20.0 - 4, 3.0 - 4])
    assert (ddf - affine_ddf(from_crop @ matrix @ to_crop, [40, 44])).abs().max() < 1e-9
    assert folding_fraction(ddf).item() == 0.0


def test_optimization_of_a_network_of_stacked_pairs() -> None:
    """One that is no `PairNetwork`, such as an exported one, takes both images padded to one shape."""
    net, (moving, fixed) = torch.nn.Sequential(network(2)), images(2)
    seen = []

    def record(inner: Any, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, weight: None) -> torch.Tensor:
        seen.append((inner(moving, fixed), ddf))
        return ddf

    RegistrationInferer(optimization=record)(moving, net, fixed=fixed)
    assert torch.equal(*seen[0])
    optimize = NetworkOptimization(steps=2, learning_rate=1e-3)
    pred = RegistrationInferer(optimization=optimize)(moving, net, fixed=fixed)
    assert (pred - RegistrationInferer()(moving, net, fixed=fixed)).abs().max() > 1e-3

    def constant(pair: torch.Tensor, by: float) -> torch.Tensor:
        return torch.full((1, 3, *pair.shape[2:]), by)

    RegistrationInferer(optimization=record)(moving, constant, 2.0, fixed=fixed)
    assert seen[1][0].unique().tolist() == [2.0] and torch.equal(*seen[1])


def test_optimization_of_a_batch_and_under_inference_mode() -> None:
    net, infer = network(2), RegistrationInferer(optimization=FieldOptimization(steps=2))
    pairs = torch.cat([torch.cat([place(i, (20, 20), (3, 4)) for i in images(2, seed=s)], 1) for s in (0, 5)])
    weight = content(20, 20, batch=2)
    with torch.inference_mode():
        together = infer(pairs.clone(), net, weight=weight)
    apart = torch.cat([infer(pairs[k : k + 1], net, weight=weight[k : k + 1]) for k in (0, 1)])
    assert (together - apart).abs().max() < 1e-5
    assert (together - infer(pairs, net)).abs().max() > 1e-3  # the weight matters


@pytest.mark.parametrize("weight", [torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 8, 8)])
def test_a_weight_that_does_not_fit_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="RegistrationInferer expects weight"):
        RegistrationInferer()(content(8, 8, channels=2), network(2), weight=weight)


# ---- how it is called


def test_stacked_and_separate_images_give_the_same() -> None:
    net, infer = network(2), RegistrationInferer()
    moving, fixed = (place(image, (20, 22), (4, 5)) for image in images(2))
    with torch.no_grad():
        stacked = infer(torch.cat([moving, fixed], dim=1), net)
        assert torch.equal(stacked, infer(moving, net, fixed=fixed))
        assert torch.equal(stacked, infer(inputs=moving, network=net, fixed=fixed))
    assert stacked.shape == (1, 3, 20, 22)
    assert torch.equal(stacked[:, 2:], warp(moving, stacked[:, :2], padding="zeros"))


def test_images_of_different_shapes() -> None:
    net, infer = network(3), RegistrationInferer()
    moving, fixed = images(3)
    moving, fixed = place(moving, (20, 11, 13), (9, 1, 3)), place(fixed, (11, 13, 9), (2, 4, 1))
    with torch.no_grad():
        pred = infer(moving, net, fixed=fixed)
        # Padding at the end keeps voxel indices: the stacked call says the same on the fixed image's voxels.
        padded = infer(torch.cat([place(image, (20, 13, 13), (0, 0, 0)) for image in (moving, fixed)], dim=1), net)
    assert pred.shape == (1, 4, 11, 13, 9)
    assert (padded[:, :3, :11, :13, :9] - pred[:, :3]).abs().max() < 1e-4


def test_a_batch_is_its_samples() -> None:
    net, infer = network(2), RegistrationInferer()
    pairs = [
        torch.cat([place(image, (24, 22), at) for image, at in zip(images(2, seed=seed), places)], dim=1)
        for seed, places in ((0, ((2, 3), (8, 9))), (5, ((10, 0), (4, 4))))
    ]
    with torch.no_grad():
        together = infer(torch.cat(pairs), net)
        assert torch.equal(together, torch.cat([infer(pair, net) for pair in pairs]))


def test_further_arguments_reach_the_network() -> None:
    def shifted(pair: torch.Tensor, by: float, scale: float) -> torch.Tensor:
        return torch.full((1, 3, *pair.shape[2:]), by * scale)

    pair = torch.cat([place(image, (20, 20), (5, 5)) for image in images(2)], dim=1)
    assert RegistrationInferer()(pair, shifted, 2.0, scale=1.5)[:, :2].unique().tolist() == [3.0]


def test_scripted_network_and_unchanged_arguments() -> None:
    net, infer = network(2), RegistrationInferer()
    pair = torch.cat([place(image, (20, 22), (3, 6)) for image in images(2)], dim=1)
    before = pair.clone()
    with torch.no_grad():
        eager, scripted = infer(pair, net), infer(pair, torch.jit.script(net))
    assert (eager - scripted).abs().max() < 1e-4
    assert torch.equal(pair, before)


# ---- refusals


@pytest.mark.parametrize("name", ["moving", "fixed"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "image is empty: every voxel of a sample"), (nan, "image .* not finite"), (-inf, "image .* not finite")],
)
def test_unusable_images_are_named(name: str, value: float, message: str) -> None:
    pair = content(8, 8, channels=2, batch=2)
    channel = 0 if name == "moving" else 1
    if value == 0:
        pair[1, channel] = 0
    else:
        pair[1, channel, 2, 3] = value
    with pytest.raises(ValueError, match=f"the {name} {message}"):
        RegistrationInferer()(pair, network(2))


@pytest.mark.parametrize("name", ["moving", "fixed"])
def test_constant_images_are_named_and_masks_are_not(name: str) -> None:
    pair = content(8, 8, channels=4, batch=2)
    first = 0 if name == "moving" else 2
    pair[1, first], pair[1, first + 1] = 0.5, 1.0
    net = PairNetwork(randomized(CARL(2, in_channels=2, **SMALL))).eval()
    with pytest.raises(ValueError, match=f"the {name} image is constant: every voxel of a sample has the same value"):
        RegistrationInferer()(pair, net)
    pair[1, first, 0, 0] = 0  # one voxel of one channel makes a mask of it
    with torch.no_grad():
        assert torch.isfinite(RegistrationInferer()(pair, net)).all()


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 8), (2, 8)])
def test_what_is_no_stacked_pair_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a stacked pair \(B, 2C, \*spatial\)"):
        RegistrationInferer()(torch.ones(shape), network(2))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 2, 8, 8), (1, 1, 8, 8, 8)])
def test_images_that_make_no_pair_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one batch size and one number of channels and axes"):
        RegistrationInferer()(torch.ones(1, 1, 8, 8), network(2), fixed=torch.ones(shape))


def test_a_network_of_other_channels_refuses_by_name() -> None:
    with pytest.raises(ValueError, match=r"the moving image must have 1 channel\(s\), got 2"):
        RegistrationInferer()(torch.rand(1, 4, 8, 8), network(2))


def test_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
        RegistrationInferer(-1)
