"""The affine stage: known maps found again, wrong voxels outvoted, directions joined, and translations followed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers_networks import SMALL, content, place, randomized, vector
from torch import nn

from equireg.fields import identity_grid, warp
from equireg.inferer import RegistrationInferer
from equireg.networks import CARL, AffineFit, PairNetwork
from equireg.networks.active import content_box
from equireg.networks.affine import affine_ddf, fit_affine, halfway

SHAPES = {2: (9, 14), 3: (7, 9, 12)}


def matrix(dims: int, seed: int = 0, size: float = 0.15, shift: float = 3.0) -> torch.Tensor:
    """Return a random homogeneous map of indices, `(2, D + 1, D + 1)`, not far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.eye(dims + 1, dtype=torch.float64).repeat(2, 1, 1)
    maps[:, :dims, :dims] += size * torch.randn(2, dims, dims, generator=generator, dtype=torch.float64)
    maps[:, :dims, dims] = shift * torch.randn(2, dims, generator=generator, dtype=torch.float64)
    return maps


def turn_2d(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[[c, -s, 4.0], [s, c, -2.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
def test_ddf_of_a_map_and_map_of_a_ddf(dims: int) -> None:
    maps, shape = matrix(dims), list(SHAPES[dims])
    ddf = affine_ddf(maps, shape)
    corner = torch.tensor([n - 1.0 for n in shape] + [1.0], dtype=torch.float64)
    last = (slice(None), slice(None), *[-1] * dims)
    assert torch.allclose(ddf[last], ((maps @ corner) - corner)[:, :dims])
    assert (fit_affine(ddf, torch.ones(2, 1, *shape)) - maps).abs().max() < 1e-5  # 1e-6 voxel^2 keep it solvable
    assert fit_affine(ddf.float(), torch.ones(2, 1, *shape)).dtype == torch.float64


@pytest.mark.parametrize("dims", [2, 3])
def test_wrong_voxels_are_outvoted_and_those_without_weight_have_no_vote(dims: int) -> None:
    maps, shape = matrix(dims), [2 * n for n in SHAPES[dims]]
    ddf = affine_ddf(maps, shape)
    generator = torch.Generator().manual_seed(1)
    weight = (torch.rand(2, 1, *shape, generator=generator) > 0.3).double()
    ddf = torch.where(weight > 0, ddf, torch.full_like(ddf, 1e3))
    assert (fit_affine(ddf, weight) - maps).abs().max() < 1e-5
    wrong = torch.rand(2, 1, *shape, generator=generator) < 0.1
    fitted = fit_affine(torch.where(wrong & (weight > 0), ddf + 10.0, ddf), weight)
    assert (affine_ddf(fitted, shape) - affine_ddf(maps, shape)).abs().max() < 0.1  # plain least squares: 1.0


def test_nothing_to_fit() -> None:
    ddf = affine_ddf(matrix(2), [6, 5])
    assert torch.equal(fit_affine(ddf, torch.zeros(2, 1, 6, 5)), torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    line = torch.zeros(2, 1, 6, 5)
    line[:, :, 3] = 1.0  # along the first axis, all content has one place
    fitted = fit_affine(ddf, line)
    assert torch.allclose(affine_ddf(fitted, [6, 5])[:, :, 3], ddf[:, :, 3], atol=1e-4)
    assert torch.allclose(fitted[:, :2, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dims", [2, 3])
def test_halfway_cancels_shrinking_and_swapping_inverts(dims: int) -> None:
    there, origin = matrix(dims), torch.zeros(2, dims, dtype=torch.float64)
    assert (halfway(there, torch.linalg.inv(there), origin) - there).abs().max() < 1e-9
    shrink = torch.diag(torch.tensor([0.6] * dims + [1.0], dtype=torch.float64)).expand(2, -1, -1)
    assert (halfway(there @ shrink, shrink @ torch.linalg.inv(there), origin) - there).abs().max() < 1e-9
    other = torch.linalg.inv(matrix(dims, seed=3))
    assert (halfway(there, other, origin) @ halfway(other, there, origin) - torch.eye(dims + 1)).abs().max() < 1e-9


def test_halfway_keeps_turns_by_any_angle() -> None:
    for degrees in range(0, 360, 30):
        turn = turn_2d(degrees)
        assert (halfway(turn, torch.linalg.inv(turn), torch.zeros(1, 2).double()) - turn).abs().max() < 1e-9


@pytest.mark.parametrize("slope", [0.0, -1.0, 0.1], ids=["to one point", "mirrored", "a hundredth"])
def test_halfway_falls_back_to_a_translation_of_the_point(slope: float) -> None:
    there = torch.tensor([[[slope, 0.0, 7.0], [0.0, abs(slope), 2.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    back = torch.linalg.inv(there) if slope else there
    found = halfway(there, back, torch.tensor([[10.0, 4.0]], dtype=torch.float64))
    expected = [[1.0, 0.0, slope * 10 + 7 - 10], [0.0, 1.0, abs(slope) * 4 + 2 - 4], [0.0, 0.0, 1.0]]
    assert torch.allclose(found[0], torch.tensor(expected, dtype=torch.float64))


class Blobs(nn.Module):
    """Match what moments of the images say, and go `share` of the way: translations, and scale along each axis."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        def moments(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            at = identity_grid(list(image.shape[2:]), image.dtype).flatten(2)
            mass = image.flatten(2) / image.sum()
            center = (mass * at).sum(2, keepdim=True)
            return center, (mass * (at - center).square()).sum(2, keepdim=True).sqrt()

        (center, width), (fixed_center, fixed_width) = moments(moving), moments(fixed)
        at = identity_grid(list(fixed.shape[2:]), fixed.dtype)
        to = center + (at.flatten(2) - fixed_center) * width / fixed_width
        return self.share * (to.reshape(at.shape) - at)


def blob(shape: tuple[int, int], center: tuple[float, float], width: tuple[float, float]) -> torch.Tensor:
    at = identity_grid(list(shape), torch.float64)
    squares = sum(((at[:, k] - c) / w).square() for k, (c, w) in enumerate(zip(center, width)))
    return torch.where(squares < 9, torch.exp(-squares / 2), 0.0).unsqueeze(1)


def test_rounds_go_on_where_the_network_stops_short() -> None:
    fixed, moving = blob((40, 44), (20, 22), (4, 4)), blob((50, 40), (27, 17), (6, 3))
    misses = []
    for rounds in (1, 2, 4):
        with torch.no_grad():
            ddf = AffineFit(Blobs(0.7), rounds)(moving, fixed)
        misses.append((warp(moving, ddf, padding="zeros") - fixed).abs().max().item())
    assert misses[0] > 0.1 and misses[0] > 2 * misses[1] > 4 * misses[2] and misses[2] < 0.05


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_random_networks_follow_whole_voxel_moves_of_either_image(dims: int, rounds: int) -> None:
    net = randomized(CARL(dims, nesting="attention", affine_rounds=rounds, **SMALL), torch.float64)
    infer, pair_net = RegistrationInferer(), PairNetwork(net).eval()
    moving, fixed = (content(*size, seed=k, dtype=torch.float64) for k, size in enumerate([(13, 10, 9), (12, 11, 8)]))
    moving, fixed = (image[(..., *[0] * (3 - dims))] if dims < 3 else image for image in (moving, fixed))
    fixed_at, canvas = (2, 1, 3)[:dims], (18, 17, 16)[:dims]
    with torch.no_grad():
        old = infer(place(moving, canvas, (3, 4, 5)[:dims]), pair_net, fixed=place(fixed, canvas, fixed_at))
        new = infer(
            place(moving, (25, 30, 21)[:dims], (8, 11, 6)[:dims]), pair_net, fixed=place(fixed, canvas, fixed_at)
        )
        wide = infer(
            place(moving, canvas, (3, 4, 5)[:dims]), pair_net, fixed=place(fixed, (26, 22, 20)[:dims], (5, 1, 7)[:dims])
        )
    by = vector((5, 7, 1)[:dims], old)
    assert (new[:, :dims] - old[:, :dims] - by).abs().max() < 1e-8
    inner = tuple(slice(first, first + size) for first, size in zip((5, 1, 7), fixed.shape[2:]))
    there = tuple(slice(first, first + size) for first, size in zip(fixed_at, fixed.shape[2:]))
    shifted = wide[:, :dims][(..., *inner)] + vector((3, 0, 4)[:dims], old)
    assert (shifted - old[:, :dims][(..., *there)]).abs().max() < 1e-8
    assert old[:, :dims].flatten(2).std(dim=2).min() > 0.01  # no translation, which any network would follow


def test_gradients_reach_the_network_and_empty_samples_get_zero() -> None:
    net = randomized(CARL(2, nesting="right", affine_rounds=2, **SMALL)).train()
    moving, fixed = content(14, 13, batch=2), content(12, 14, batch=2, seed=1)
    moving[0] = 0.0
    ddf = net.attention_stage()(moving, fixed)
    assert (ddf[0] == 0).all() and (ddf[1] != 0).any()
    ddf.square().mean().backward()
    gradients = [p.grad for p in net.attention_stage().parameters()]
    assert all(torch.isfinite(g).all() for g in gradients) and sum(float(g.abs().sum()) for g in gradients) > 0


def test_fit_and_halfway_have_the_right_gradients() -> None:
    there, back = matrix(2), torch.linalg.inv(matrix(2, seed=2))
    inputs = [m.clone().requires_grad_() for m in (there, back)]
    point = torch.ones(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: halfway(a, b, point), inputs)
    # Of a field that a map describes the robust fit is the plain one, slope and all.
    ddf = affine_ddf(matrix(2), [4, 5]).requires_grad_()
    votes = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (fit_affine(ddf, torch.ones(2, 1, 4, 5)) * votes).sum().backward()
    at = torch.cat([identity_grid([4, 5], torch.float64).flatten(2)[0], torch.ones(1, 20).double()])
    plain = votes[:, :2] @ torch.linalg.pinv(at).T
    torch.testing.assert_close(ddf.grad.flatten(2), plain, rtol=0, atol=1e-4)


def test_samples_without_a_root_leave_the_gradients_of_others_alone() -> None:
    there = torch.stack([torch.diag(torch.tensor(d)) for d in ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0])])
    there, back = (m.double().requires_grad_() for m in (there, torch.eye(3).repeat(3, 1, 1)))
    found = halfway(there, back, torch.ones(3, 2, dtype=torch.float64))
    (found * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert there.grad.isfinite().all() and back.grad.isfinite().all()
    assert (there.grad[1] != 0).any() and (there.grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_coordinates_are_never_counted_in_half_precision(dtype: torch.dtype) -> None:
    fixed, moving = blob((20, 22), (9, 10), (3, 3)).to(dtype), blob((22, 20), (12, 8), (4, 2)).to(dtype)
    ddf = AffineFit(Blobs(0.7), 2)(moving, fixed)
    assert ddf.dtype == torch.promote_types(dtype, torch.float32) and ddf.isfinite().all()


class Recorded(nn.Module):
    """Answer the vector between the centers of the boxes, and note where the content of each moving image begins."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        (first, last), (fixed_first, fixed_last) = content_box(moving), content_box(fixed)
        self.sizes.append((last - first)[0].tolist())
        by = (first + last - fixed_first - fixed_last).to(moving.dtype) / 2
        return by.reshape(1, 2, 1, 1).expand(1, 2, *fixed.shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_content_moved_by_half_a_voxel_is_the_same_from_everywhere(dtype: torch.dtype) -> None:
    sizes = set()
    for at in range(12):
        net = Recorded()
        moving, fixed = content(12, 11, dtype=dtype), content(13, 14, seed=1, dtype=dtype)
        AffineFit(net, 2)(place(moving, (40, 40), (at, 2 * at)), place(fixed, (40, 40), (13, 12)))
        sizes.add(tuple(net.sizes[2]))  # what the second round is given
    assert len(sizes) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("nesting", ["attention", "deck"])
def test_scripting_and_files(nesting: str) -> None:
    net = randomized(CARL(2, nesting=nesting, affine_rounds=2, **SMALL))
    moving, fixed = content(12, 14), content(14, 12, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(moving, fixed), net(moving, fixed), rtol=0, atol=1e-4)
    same, plain = CARL(**net.arguments), CARL(2, nesting=nesting, **SMALL)
    same.load_state_dict(net.state_dict())
    assert "affine_rounds" not in plain.arguments, "files written before the argument existed must keep loading"
    state = {**plain.state_dict(), "_extra_state": net.state_dict()["_extra_state"]}
    with pytest.raises(ValueError, match="affine_rounds 2 instead of None"):
        plain.load_state_dict(state)
    named = json.dumps({**plain.arguments, "affine_rounds": 0})
    plain.load_state_dict({**plain.state_dict(), "_extra_state": torch.tensor(list(named.encode()), dtype=torch.uint8)})


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        AffineFit(Blobs(1.0), 0)
    with pytest.raises(ValueError, match="0 for nesting 'attention'"):
        CARL(2, **SMALL, nesting="attention", extra_refinements=1)
    for options in ({"affine_rounds": -1}, {"affine_rounds": 1, "nesting": "left"}):
        with pytest.raises(ValueError, match="affine_rounds must be at least 0"):
            CARL(2, **SMALL, **options)
