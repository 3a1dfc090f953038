"""Two steps, pooling and lifting against hand-made networks whose answers are known in closed form."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers_networks import content, place, randomized
from torch import nn

from equireg.fields import compose, identity_grid, warp
from equireg.networks import CoordinateAttention, DisplacementUNet, Downsample, TwoStep
from equireg.networks.combinators import both, first_step


class Affine(nn.Module):
    """Answers `A x + b` whatever it is shown, and remembers what that was."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.4 * torch.rand(dims, dims, dtype=torch.float64) - 0.2)
        self.shift = nn.Parameter(torch.rand(dims, dtype=torch.float64))

    def at(self, points: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bj...->bi...", self.matrix, points) + self.shift.reshape(
            1, -1, *[1] * (points.dim() - 2)
        )

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        self.seen = moving, fixed
        return self.at(identity_grid(list(fixed.shape[2:]), torch.float64)).expand(
            fixed.shape[0], *[-1] * (fixed.dim() - 1)
        )


def attention(dims: int = 2) -> nn.Module:
    return randomized(CoordinateAttention(dims, 1, 8))


def unet(dims: int = 2) -> nn.Module:
    return randomized(DisplacementUNet(dims, 1, (4, 8)))


NETS = {
    "attention": attention,
    "unet": unet,
    "down": lambda: Downsample(attention(), 3),
    "down phase": lambda: Downsample(attention(), 4, content_phase=True),
    "two": lambda: TwoStep(attention(), unet()),
    "right": lambda: TwoStep(Downsample(attention(), 4, True), TwoStep(Downsample(unet(), 2), unet())),
    "left": lambda: TwoStep(Downsample(TwoStep(Downsample(attention(), 2, True), unet()), 2, True), unet()),
}


def pair(dims: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of different shapes, their content off the center and at the border."""
    moving = place(content(*[11] * dims, batch=2), [21, 17, 19][:dims], [9, 6, 3][:dims])
    return moving, place(content(*[12] * dims, batch=2, seed=1), [15, 22, 14][:dims], [0, 5, 1][:dims])


# ---- two steps


@pytest.mark.parametrize("dims", [2, 3])
def test_two_step_is_the_manual_composition(dims: int) -> None:
    first, second = Downsample(attention(dims), 2), unet(dims)
    moving, fixed = pair(dims)
    step = first(moving, fixed)
    rest = second(warp(moving, step, padding="zeros"), fixed)
    assert torch.equal(TwoStep(first, second)(moving, fixed), compose(step, rest))
    # By hand: the second displacement first, then the first one from there. Double precision adds indices exactly.
    step, rest, grid = step.double(), rest.double(), identity_grid(list(fixed.shape[2:]), torch.float64)
    points = grid + rest
    assert torch.equal(compose(step, rest), rest + warp(step, points - grid))
    assert rest.abs().max() > 0.1


def test_second_step_sees_the_moved_image_over_background() -> None:
    """What is pushed out over the edge is followed by background, not by a smear of the border."""
    first, second = Affine(2), Affine(2)
    with torch.no_grad():
        first.matrix.zero_()
        first.shift.copy_(torch.tensor([3.0, 0.0]))
    image = content(6, 6, dtype=torch.float64)
    ddf = TwoStep(first, second)(image, image)
    moved, fixed = second.seen
    torch.testing.assert_close(moved, place(image[:, :, 3:], (6, 6), (0, 0)), rtol=0, atol=1e-12)
    assert fixed is image
    expected = second.at(identity_grid([6, 6], torch.float64)) + first.shift.reshape(1, 2, 1, 1)
    torch.testing.assert_close(ddf, expected, rtol=0, atol=1e-12)


# ---- pooling and lifting


@pytest.mark.parametrize("content_phase", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_lifting_an_affine_field(dims: int, factor: int, content_phase: bool) -> None:
    """Coarse voxel c sits at fine index f c + (f - 1) / 2 + p_fixed, and u = f u_c + p_moving - p_fixed."""
    stub = Affine(dims)
    starts = (torch.tensor([5, 3, 2])[:dims], torch.tensor([2, 7, 0])[:dims])
    shapes = [13, 17, 11][:dims], [19, 14, 9][:dims]
    moving, fixed = (place(content(*[6] * dims, dtype=torch.float64), s, a.tolist()) for s, a in zip(shapes, starts))
    ddf = Downsample(stub, factor, content_phase)(moving, fixed)
    assert list(ddf.shape) == [1, dims, *shapes[1]]
    phases = [a % factor if content_phase else 0 * a for a in starts]

    for image, seen, phase in zip((moving, fixed), stub.seen, phases):  # blocks averaged one by one
        assert list(seen.shape[2:]) == [-(-n // factor) for n in image.shape[2:]]
        padded = F.pad(image, [0, 2 * factor] * dims)
        for block in product(*(range(n) for n in seen.shape[2:])):
            where = [slice(factor * c + p, factor * c + p + factor) for c, p in zip(block, phase.tolist())]
            torch.testing.assert_close(seen[(0, 0, *block)], padded[(0, 0, *where)].mean(), rtol=0, atol=1e-12)

    view = (1, dims, *[1] * dims)
    moving_phase, fixed_phase = (p.double().reshape(view) for p in phases)
    points = (identity_grid(shapes[1], torch.float64) - (factor - 1) / 2 - fixed_phase) / factor
    for k in range(dims):  # the border continues where no two coarse centers enclose the point
        points[:, k] = points[:, k].clamp(0, stub.seen[1].shape[2 + k] - 1)
    expected = factor * stub.at(points) + moving_phase - fixed_phase
    torch.testing.assert_close(ddf, expected, rtol=0, atol=1e-11)


def test_phases_are_per_sample() -> None:
    net = Downsample(attention(), 4, content_phase=True)
    moving = torch.cat([place(content(7, 9, seed=k), (18, 21), (k, 5 - k)) for k in range(4)])
    fixed = torch.cat([place(content(9, 6, seed=9 + k), (17, 15), (3 + k, k)) for k in range(4)])
    moving[3] = 0.0
    together, alone = net(moving, fixed), torch.cat([net(m[None], f[None]) for m, f in zip(moving, fixed)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[3] == 0).all()


@pytest.mark.parametrize("factor", [0, 2.5, 2.0, None, "2"])
def test_downsample_refuses_factors(factor) -> None:
    with pytest.raises(ValueError, match=f"factor must be an integer of at least 1, got {factor!r}"):
        Downsample(nn.Identity(), factor)


# ---- all of them


@pytest.mark.parametrize("name", NETS)
def test_both_equals_two_calls(name: str) -> None:
    net, (moving, fixed) = NETS[name]().eval(), pair()
    there, back = both(net, moving, fixed)
    assert there.shape[2:] == fixed.shape[2:] and back.shape[2:] == moving.shape[2:]
    assert torch.equal(there, net(moving, fixed))
    assert torch.equal(back, net(fixed, moving))


def test_both_encodes_each_image_once() -> None:
    net, (moving, fixed) = NETS["left"](), pair()
    calls: list[None] = []
    encoder = next(m for m in net.modules() if isinstance(m, CoordinateAttention)).encoder
    encoder.register_forward_hook(lambda *_: calls.append(None))
    both(net, moving, fixed)
    assert len(calls) == 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter(name: str, training: bool) -> None:
    net, (moving, fixed) = NETS[name]().train(training), pair()
    sum(ddf.square().sum() for ddf in both(net, moving, fixed)).backward()
    for parameter, value in net.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), parameter
        # Batch statistics take the biases of the layers before them out again: no gradient there is right in training.
        assert value.grad.abs().max() > 0 or (training and parameter.endswith("conv3.bias")), parameter


@pytest.mark.parametrize("name", NETS)
def test_arguments_stay_and_nothing_is_cached(name: str) -> None:
    net, (moving, fixed) = NETS[name]().eval(), pair()
    copies, names = (moving.clone(), fixed.clone()), [sorted(vars(m)) for m in net.modules()]
    first = net(moving, fixed)
    net(fixed, moving)
    assert torch.equal(net(moving, fixed), first)
    assert torch.equal(moving, copies[0]) and torch.equal(fixed, copies[1])
    assert [sorted(vars(m)) for m in net.modules()] == names


def test_first_step_is_the_attention_at_full_resolution() -> None:
    net, (moving, fixed) = NETS["left"](), pair()
    inner = net.first.net.first.net
    stage = first_step(net)
    assert isinstance(inner, CoordinateAttention)
    expected = Downsample(Downsample(inner, 2, True), 2, True)(moving, fixed)
    assert torch.equal(stage(moving, fixed), expected)
    assert {id(p) for p in stage.parameters()} == {id(p) for p in inner.parameters()}
    assert first_step(inner) is inner
