"""Optical flow: sign and unit of known moves, no direction special, and hands off what does not agree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers_networks import SMALL, content, place, randomized

from equireg.fields import compose, identity_grid, jacobian_determinant, warp
from equireg.metrics import folding_fraction
from equireg.networks import CARL, LucasKanade, TwoStep
from equireg.networks.affine import affine_ddf
from equireg.networks.carl import NESTINGS, arguments_from_state
from equireg.networks.rotation import turn, turn_matrix
from equireg.windows import gaussian_blur

SHAPES = {2: (33, 40), 3: (21, 26, 24)}


def texture(points: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return a smooth image `(1, 1, *shape)` in double precision, from 0.2 to 1, sampled at any points."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(points[:, :1])
    for _ in range(12):
        wave = torch.randn(points.shape[1], generator=generator, dtype=points.dtype) * 0.6
        phase = torch.einsum("d,bd...->b...", wave, points) + 6.3 * torch.rand(1, generator=generator).item()
        total = total + torch.sin(phase).unsqueeze(1)
    return 0.6 + 0.4 * torch.tanh(total / 5)


def ball(shape: tuple[int, ...]) -> torch.Tensor:
    grid = identity_grid(list(shape), torch.float64)
    center = torch.tensor([(n - 1) / 2 for n in shape]).reshape(1, -1, *[1] * len(shape))
    return (((grid - center) / (center - 2)).square().sum(dim=1, keepdim=True) < 1).double()


def known_move(dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return moving, fixed, the true ddf, smooth and up to a voxel or so, and where it is asked for."""
    shape = SHAPES[dims]
    grid = identity_grid(list(shape), torch.float64)
    truth = torch.stack([0.8 * torch.sin(grid[:, (k + 1) % dims] / 6 + k) + 0.4 * (k == 0) for k in range(dims)], dim=1)
    mask = ball(shape)
    inner = gaussian_blur(mask, 2.0) > 0.99
    # moving(x + ddf(x)) = fixed(x): the fixed image is the moving one's function at the displaced points.
    return texture(grid) * ball(shape), texture(grid + truth) * mask, truth, inner.expand_as(truth)


def alike(*size: int, channels: int = 1, batch: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return random values, and those of about half a voxel further: two images without structure that agree."""
    dims, values = len(size), content(*[n + 1 for n in size], channels=channels, batch=batch, dtype=dtype)
    for axis in range(2, dims + 2):
        ahead = values.roll(-1, axis)
        values = 0.7 * values + 0.3 * ahead
    here = (..., *[slice(n) for n in size])
    there = sum(values.roll(-1, axis) for axis in range(2, dims + 2)) / dims
    return [values[here].contiguous(), (0.5 * values + 0.5 * there)[here].contiguous()]


def trustful(net: torch.nn.Module) -> torch.nn.Module:
    """Let every equation count in full, so that images without anything in common are moved as well."""
    for module in net.modules():
        if isinstance(module, LucasKanade):
            module.trust = 0
    return net


@pytest.mark.parametrize("dims", [2, 3])
def test_known_moves_are_found(dims: int) -> None:
    moving, fixed, truth, inner = known_move(dims)
    size = truth[inner].abs().mean()
    one, five = (LucasKanade(dims, rounds=rounds)(moving, fixed) for rounds in (1, 5))
    assert size > 0.5 and (one - truth)[inner].abs().mean() < 0.35 * size
    assert (five - truth)[inner].abs().mean() < 0.2 * size
    assert jacobian_determinant(five).min() > 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("by", [-1.0, 0.5, 1.0])
def test_a_shift_along_one_axis(dims: int, by: float) -> None:
    """Content of the moving image that lies further along an axis gives a positive displacement, in voxels."""
    grid = identity_grid(list(SHAPES[dims]), torch.float64)
    for axis in range(dims):
        shift = torch.zeros(1, dims, *[1] * dims, dtype=torch.float64)
        shift[:, axis] = by
        moving, fixed = texture(grid - shift), texture(grid)
        ddf = LucasKanade(dims, rounds=5)(moving, fixed)
        inner = (slice(None), slice(None), *[slice(6, -6)] * dims)
        assert (ddf - shift)[inner].abs().mean() < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_equal_images_are_left_alone(dims: int) -> None:
    image = content(*[9, 12, 7][:dims], batch=2)
    assert LucasKanade(dims)(image, image).abs().max() < 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_no_direction_is_special(dims: int) -> None:
    """Both images turned or mirrored by any of the 8 or 48 symmetries of the grid: so is the answer."""
    net = LucasKanade(dims, rounds=2)
    moving, fixed = alike(*[10, 9, 8][:dims])
    ddf = net(moving, fixed)
    assert ddf.std() > 0.03
    for perm in itertools.permutations(range(dims)):
        for signs in itertools.product([1, -1], repeat=dims):
            p, s = list(perm), list(signs)
            expected = torch.einsum("ij,bj...->bi...", turn_matrix(p, s), turn(ddf, p, s))
            assert (net(turn(moving, p, s), turn(fixed, p, s)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dims", [2, 3])
def test_images_that_move_together(dims: int) -> None:
    net, size, canvas = LucasKanade(dims, rounds=3), [8, 9, 7][:dims], [40, 42, 41][:dims]
    moving, fixed = alike(*size)
    answers = []
    for at in ([16] * dims, [15, 19, 17][:dims]):
        ddf = net(place(moving, canvas, at), place(fixed, canvas, at))
        answers.append(ddf[(..., *[slice(a, a + n) for a, n in zip(at, size)])])
    assert (answers[0] - answers[1]).abs().max() < 1e-12 < 0.03 < answers[0].std()


@pytest.mark.parametrize("dims", [2, 3])
def test_other_contrasts(dims: int) -> None:
    """Brightness and gain change next to nothing; where the contrast is inverted, nothing is moved."""
    moving, fixed, truth, inner = known_move(dims)
    mask, net = (moving != 0).double(), LucasKanade(dims, rounds=6)
    reference = net(moving, fixed)
    assert reference[inner].abs().mean() > 0.4
    brighter = net((0.5 * moving + 0.1) * mask, fixed)
    assert (brighter - reference)[inner].abs().mean() < 0.1
    inverted = net((1.2 - moving) * mask, fixed)
    assert inverted[inner].abs().mean() < 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_a_sharp_border_stays_where_it_is(dims: int) -> None:
    """Of content that ends abruptly, as a mask leaves it: what lies within must not be drawn over its border."""
    fixed = ball(SHAPES[dims]) * (0.3 + 0.5 * texture(identity_grid(list(SHAPES[dims]), torch.float64)))
    moving = warp(fixed, torch.full((1, dims, *[1] * dims), 0.3, dtype=torch.float64).expand(1, dims, *SHAPES[dims]))
    before, after = (
        (warp(moving, ddf, padding="zeros") - fixed).square().mean().sqrt()
        for ddf in (torch.zeros(1, dims, *SHAPES[dims]).double(), LucasKanade(dims, rounds=10)(moving, fixed))
    )
    assert after < 0.8 * before


@pytest.mark.parametrize("dims", [2, 3])
def test_a_round_moves_nothing_far(dims: int) -> None:
    """Noise promises all sorts of things."""
    moving, fixed = (content(*[20] * dims, seed=k) for k in range(2))
    for rounds in (1, 2):
        longest = trustful(LucasKanade(dims, rounds=rounds))(moving, fixed).norm(dim=1).max()
        assert 0.5 < longest <= 2.0 * rounds + 1e-4


@pytest.mark.parametrize("dims", [2, 3])
def test_each_sample_on_its_own_and_empty_ones_are_left_alone(dims: int) -> None:
    net, shape = LucasKanade(dims, 2, rounds=2), [9, 8, 7][:dims]
    moving, fixed = alike(*shape, channels=2, batch=3, dtype=torch.float32)
    moving[0] = 0
    moving.requires_grad_()
    ddf = net(moving, fixed)
    assert not ddf[0].any() and ddf[1:].abs().max() > 0.05
    alone = torch.cat([net(moving[k : k + 1], fixed[k : k + 1]) for k in range(3)])
    assert (alone - ddf).abs().max() < 1e-5
    ddf.square().sum().backward()
    assert moving.grad is not None and moving.grad.isfinite().all() and moving.grad[1].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients(dims: int) -> None:
    moving, fixed = (place(image, [6] * dims, [1] * dims) for image in alike(*[4] * dims))
    inside = moving != 0
    net = LucasKanade(dims, rounds=2)

    def answer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # what is background stays background
        return net(torch.where(inside, a, 0.0), torch.where(inside, b, 0.0))

    assert torch.autograd.gradcheck(answer, (moving.requires_grad_(), fixed.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 2, 5), (17, 3, 7)])
def test_any_shape_and_a_moving_image_of_another_shape(shape: tuple[int, ...]) -> None:
    larger = [n + 3 for n in shape]
    moving, fixed = content(*larger), content(*shape, seed=1)
    ddf = LucasKanade(len(shape))(moving, fixed)
    assert ddf.shape == (1, len(shape), *shape) and ddf.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    """Images may be of half precision; all arithmetic is not."""
    moving, fixed = (texture(identity_grid([24, 26], torch.float64), seed).to(dtype) for seed in (0, 1))
    reference = LucasKanade(2)(moving.float(), fixed.float())
    assert torch.equal(LucasKanade(2)(moving, fixed), reference) and reference.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LucasKanade(2)(moving.float(), fixed.float()), reference)


@pytest.mark.parametrize("dims", [2, 3])
def test_scripted_and_traced(dims: int) -> None:
    net = LucasKanade(dims, rounds=2).eval()
    moving, fixed = alike(*[9, 8, 7][:dims], dtype=torch.float32)
    example, expected = content(*[9, 8, 7][:dims]), net(moving, fixed)
    assert expected.abs().max() > 0.05
    assert torch.equal(torch.jit.script(net)(moving, fixed), expected)
    assert torch.equal(torch.jit.trace(net, (example, fixed))(moving, fixed), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3 .*got 4 and 1"),
        ({"spatial_dims": 2, "in_channels": 0}, "got 2 and 0"),
        ({"spatial_dims": 2, "rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"spatial_dims": 2, "rounds": 1.5}, "got 1.5"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LucasKanade(**arguments)


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match=r"must have 1 channel\(s\), got 2"):
        LucasKanade(2)(content(8, 8, channels=2), content(8, 8, channels=2))
    with pytest.raises(ValueError, match="must be finite"):
        LucasKanade(2)(content(8, 8) * float("nan"), content(8, 8))


# ---- at the end of a network


@pytest.mark.parametrize("nesting", NESTINGS)
def test_flow_is_the_last_step_of_a_network_and_rests_in_training(nesting: str) -> None:
    net = trustful(randomized(CARL(2, nesting=nesting, flow_rounds=(2, 3), **SMALL), torch.float64))
    plain = CARL(2, nesting=nesting, **SMALL).double().eval()
    plain.load_state_dict({**net.state_dict(), "_extra_state": plain.get_extra_state()})
    moving, fixed = content(21, 18, dtype=torch.float64), content(19, 22, seed=1, dtype=torch.float64)
    before, after = plain(moving, fixed), net(moving, fixed)
    flow = net.flow(warp(moving, before, padding="zeros"), fixed)
    at = flow + identity_grid([19, 22], torch.float64)
    inside = ((at >= 0) & (at <= torch.tensor([18.0, 21.0]).reshape(1, 2, 1, 1))).all(dim=1, keepdim=True).expand_as(at)
    assert 0.5 < inside.double().mean() < 1 and torch.allclose(after[inside], compose(before, flow)[inside])
    assert not torch.allclose(after, before, atol=0.1)
    there, back = net.both(moving, fixed)
    assert torch.allclose(there, after) and torch.allclose(back, net(fixed, moving))
    assert torch.equal(net.train()(moving, fixed), plain.train()(moving, fixed))
    assert all(torch.allclose(a, b) for a, b in zip(net.both(moving, fixed), plain.both(moving, fixed)))
    scripted = torch.jit.script(net.eval())
    assert torch.allclose(scripted(moving, fixed), net(moving, fixed))


@pytest.mark.parametrize("dims", [2, 3])
def test_turned_images_do_not_fold_at_the_border(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flow looks beyond the grid, a turn by 150 degrees goes on."""
    shape = [30] * dims
    grid = identity_grid(shape, torch.float64)
    c, s = math.cos(math.radians(150)), math.sin(math.radians(150))
    matrix, half = torch.eye(dims + 1, dtype=torch.float64), torch.tensor([(n - 1) / 2 for n in shape]).double()
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    matrix[:dims, dims] = half - matrix[:dims, :dims] @ half
    turned = affine_ddf(matrix[None], shape)
    moving, fixed = texture(grid + affine_ddf(torch.linalg.inv(matrix)[None], shape)), texture(grid + 0.8)
    net = CARL(dims, flow_rounds=(4, 4), **SMALL).eval()
    monkeypatch.setattr(net.steps, "forward", lambda *_: turned)
    ddf = net(moving, fixed)
    assert (ddf - turned).abs().mean() > 0.1
    beyond = compose(turned, net.flow(warp(moving, turned, padding="zeros"), fixed))
    assert folding_fraction(ddf) == 0 < folding_fraction(beyond)


def test_flow_goes_from_coarse_to_fine() -> None:
    net = CARL(3, flow_rounds=(1, 2, 3), **SMALL)
    assert isinstance(net.flow, TwoStep) and isinstance(net.flow.first, TwoStep)
    coarse, middle, fine = net.flow.first.first, net.flow.first.second, net.flow.second
    assert (coarse.factor, middle.factor) == (4, 2)
    assert (coarse.net.rounds, middle.net.rounds, fine.rounds) == (1, 2, 3)
    assert sum(p.numel() for p in net.flow.parameters()) == 0


def test_the_state_dict_tells_of_the_flow_and_fits_without_it() -> None:
    net, plain = CARL(2, flow_rounds=(4, 6), **SMALL), CARL(2, **SMALL)
    assert net.arguments["flow_rounds"] == [4, 6] and "flow_rounds" not in plain.arguments
    assert arguments_from_state(net.state_dict()["_extra_state"]) == net.arguments
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    assert net.arguments["flow_rounds"] == [4, 6] and "flow_rounds" not in plain.arguments


@pytest.mark.parametrize("wrong", [3, (0,), (2, 1.5)])
def test_rounds_are_checked(wrong: object) -> None:
    with pytest.raises(ValueError, match="flow_rounds must be integers of at least 1"):
        CARL(2, **SMALL, flow_rounds=wrong)
