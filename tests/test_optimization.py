"""Instance optimization: it finds known fields, never does worse than its start, and leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf, nan
from statistics import mean
from typing import Any

import pytest
import torch
from helpers_networks import SMALL, randomized
from monai.data import MetaTensor
from monai.losses import GlobalMutualInformationLoss
from torch import nn

from equireg.fields import identity_grid, resize, warp
from equireg.losses import DiffusionLoss, GradICONLoss, LocalCorrelationLoss, MINDSSCLoss
from equireg.metrics import folding_fraction
from equireg.networks import CARL, DisplacementUNet
from equireg.networks.affine import affine_ddf
from equireg.optimization import FieldOptimization, NetworkOptimization, _averaged

BOTH = [FieldOptimization, NetworkOptimization]


def wave(shape: Sequence[int], size: float, phase: float = 0.0) -> torch.Tensor:
    """A smooth field, `size` voxels high, of one wave along each axis."""
    grid = identity_grid(list(shape))
    turns = sum(6.28 * grid[:, k : k + 1] / n for k, n in enumerate(shape))
    return size * torch.cat([torch.sin(turns + k + phase) for k in range(len(shape))], dim=1)


def textured(shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Smooth random structure from about 0.2 to 0.8 in a box of background, `(1, 1, *shape)`."""
    noise = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    for axis in range(2, noise.dim()):
        for _ in range(3):
            noise = (noise.roll(1, axis) + noise.roll(-1, axis) + 2 * noise) / 4
    inside = torch.zeros_like(noise)
    inside[(..., *[slice(3, n - 3) for n in shape])] = 1.0
    return ((noise - 0.5) * 2 ** len(shape) * 0.3 + 0.5).clamp(0.1, 1.0) * inside


def pair(
    shape: Sequence[int] = (30, 33), size: float = 1.5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A moving image, it warped by a known field, and the field."""
    moving, ddf = textured(shape, seed), wave(shape, size)
    return moving, warp(moving, ddf, padding="zeros"), ddf


def small_network(dims: int = 2) -> nn.Module:
    return randomized(CARL(dims, **SMALL))


def optimizations(steps: int = 3, **options: Any) -> list[Any]:
    return [FieldOptimization(steps, **options), NetworkOptimization(steps, learning_rate=1e-3, **options)]


# ---- the field


@pytest.mark.parametrize(
    ("similarity", "left"),
    [(LocalCorrelationLoss(2.0), 0.1), (MINDSSCLoss(1, 1), 0.25), (GlobalMutualInformationLoss(), 0.2)],
)
def test_a_known_field_is_found(similarity: Any, left: float) -> None:
    moving, fixed, expected = pair()
    content = (fixed != 0).expand_as(expected)
    optimize = FieldOptimization(60, 0.5, similarity=similarity, regularity_weight=0.02)
    ddf = optimize(None, moving, fixed, torch.zeros_like(expected))
    before, after = expected[content].abs().mean(), (ddf - expected)[content].abs().mean()
    assert after < left * before  # 0.95 voxels before
    assert folding_fraction(ddf).item() == 0.0


@pytest.mark.parametrize("spacing", [1, 2])
def test_a_known_field_is_found_in_3d_between_images_of_different_shapes(spacing: int) -> None:
    moving, fixed, expected = pair((15, 18, 16), 0.8)
    moving = nn.functional.pad(moving, (1, 2, 0, 0, 4, 0))  # 4, 0 and 1 voxels in front
    offset = torch.tensor([4.0, 0.0, 1.0]).reshape(1, 3, 1, 1, 1)
    optimize = FieldOptimization(40, 0.3, regularity_weight=0.02, spacing=spacing)
    ddf = optimize(None, moving, fixed, offset.expand_as(expected))
    content = (fixed != 0).expand_as(expected)
    assert (ddf - offset - expected)[content].abs().mean() < 0.5 * expected[content].abs().mean()  # 0.51 voxels


def test_contrast_is_no_matter_with_mind() -> None:
    """Over several pairs: the way down is chaotic, and one pair tells how its numbers were rounded."""
    left: dict[str, list[float]] = {"mind": [], "squares": []}
    for seed in range(5):
        moving, fixed, expected = pair(seed=seed)
        fixed = torch.where(fixed != 0, 1.1 - fixed, fixed)
        content = (fixed != 0).expand_as(expected)
        for name, similarity in (("mind", MINDSSCLoss(1, 1)), ("squares", nn.MSELoss())):
            optimize = FieldOptimization(60, 0.3, similarity=similarity, regularity_weight=0.05)
            ddf = optimize(None, moving, fixed, torch.zeros_like(expected))
            left[name].append(float((ddf - expected)[content].abs().mean() / expected[content].abs().mean()))
    assert mean(left["mind"]) < 0.35  # 0.25, from 0.2 to 0.37 over 27 pairs and two ways of rounding
    assert mean(left["squares"]) > 1.0  # what minds contrast is led astray


def test_the_weight_says_where_similarity_counts() -> None:
    moving, fixed, expected = pair()
    weight = torch.ones_like(fixed)
    weight[:, :, 14:] = 0.0
    other = fixed.clone()
    other[:, :, 18:] = textured((30, 33), seed=7)[:, :, 18:]  # unrelated, and beyond the windows of the first 14 rows
    start = torch.zeros_like(expected)
    optimize = FieldOptimization(40, similarity=LocalCorrelationLoss(2.0), regularity_weight=0.02, levels=1)
    weighted = optimize(None, moving, other, start, weight)
    region = (..., slice(4, 13), slice(4, 29))
    assert (weighted - expected)[region].abs().mean() < 0.4 * expected[region].abs().mean()
    assert torch.equal(weighted, optimize(None, moving, fixed, start, weight))
    assert not torch.equal(optimize(None, moving, other, start), optimize(None, moving, fixed, start))


def test_the_penalty_keeps_cells_from_folding() -> None:
    moving, fixed = textured((24, 26), seed=1), textured((24, 26), seed=2)  # nothing in common
    start = torch.zeros(1, 2, 24, 26)
    options = {"similarity": torch.nn.MSELoss(), "regularity_weight": 0.0}
    free = FieldOptimization(30, folding_weight=0.0, **options)(None, moving, fixed, start)
    kept = FieldOptimization(30, **options)(None, moving, fixed, start)
    assert folding_fraction(free).item() > 0.02
    assert folding_fraction(kept).item() < 0.001
    assert (kept - start).abs().max() > 0.3


def test_controls_lift_translations_and_ramps_as_they_are() -> None:
    """What the controls say in voxels is what the voxels do; only beyond the outermost controls ramps level off."""
    for spacing, smoothing in ((1, 0.0), (2, 0.0), (3, 0.0), (2, 1.0), (4, 2.0)):
        optimize = FieldOptimization(spacing=spacing, smoothing=smoothing)
        shape = torch.Size([61, 18])
        controls = torch.full((1, 2, -(-61 // spacing), -(-18 // spacing)), 0.7)
        assert (optimize._lift(controls, shape) - 0.7).abs().max() < 1e-6
        assert optimize._lift(controls, shape).shape == (1, 2, 61, 18)
        # Control c sits at voxel spacing * c + (spacing - 1) / 2.
        controls[:, 0] = 0.1 * (spacing * identity_grid(list(controls.shape[2:]))[:, 0] + (spacing - 1) / 2)
        reach = int(spacing * (2 * smoothing + 1))
        ramp = optimize._lift(controls, shape)[0, 0, reach : 61 - reach]
        assert (ramp - 0.1 * torch.arange(reach, 61 - reach)[:, None]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 17), (7, 1), (5, 1, 9), (6, 7, 5)])
def test_thin_and_odd_grids(shape: tuple[int, ...]) -> None:
    moving, fixed = torch.rand(1, 2, *shape), torch.rand(1, 2, *shape)
    ddf = FieldOptimization(2, spacing=4)(None, moving, fixed, torch.zeros(1, len(shape), *shape))
    assert ddf.shape == (1, len(shape), *shape) and torch.isfinite(ddf).all()


@pytest.mark.parametrize(("moving_shape", "shape"), [((70, 66), (66, 61)), ((33, 35, 34), (34, 32, 37))])
def test_levels_find_larger_moves(moving_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    expected = wave(shape, 1.0) + 5.0
    moving = textured(moving_shape)
    fixed = warp(moving, expected, padding="zeros")
    start, content = torch.zeros_like(expected), (fixed != 0).expand_as(expected)
    misses = []
    for levels in (1, 3):
        ddf = FieldOptimization(30, 0.5, regularity_weight=0.02, levels=levels)(None, moving, fixed, start)
        misses.append((ddf - expected)[content].abs().mean().item())
        assert ddf.shape == expected.shape and folding_fraction(ddf).item() < 0.01
    assert misses[1] < 0.5 < misses[0]


def test_levels_average_what_lies_in_them_and_stop_at_eight_voxels() -> None:
    assert FieldOptimization(levels=4)._factors([64, 33, 40]) == [4, 2, 1]
    assert FieldOptimization(levels=4)._factors([64, 15]) == FieldOptimization(levels=1)._factors([64, 64]) == [1]
    values = torch.arange(10.0).reshape(1, 1, 2, 5)
    assert _averaged(values, 2).flatten().tolist() == [3.0, 5.0, 6.5]  # the last of the two voxels that are left
    assert torch.equal(_averaged(values, 1), values)
    # A ramp comes back as the ramp it was, in voxels, but for where it levels off beyond the outermost blocks.
    ramp = (0.1 * identity_grid([16, 17, 18])).contiguous()
    back = resize(_averaged(ramp, 2) / 2, 2)[:, :, :16, :17, :18]
    assert (back - ramp)[:, :, 1:-2, 1:-2, 1:-2].abs().max() < 1e-5


def test_a_weight_counts_on_every_level() -> None:
    moving, fixed, expected = pair((40, 44))
    other, weight = fixed.clone(), torch.ones_like(fixed)
    other[:, :, 24:], weight[:, :, 16:] = textured((40, 44), seed=7)[:, :, 24:], 0.0
    optimize = FieldOptimization(10, similarity=LocalCorrelationLoss(1.0), regularity_weight=0.02, levels=2)
    start = torch.zeros_like(expected)
    assert torch.equal(optimize(None, moving, other, start, weight), optimize(None, moving, fixed, start, weight))
    assert not torch.equal(optimize(None, moving, other, start), optimize(None, moving, fixed, start))


def test_a_turn_is_no_lack_of_regularity() -> None:
    """An image and itself turned by 120 degrees: the right field stays as it is, however heavy the regularity."""
    c, s = -0.5, 0.75**0.5
    center = torch.tensor([20.0, 22.0])
    turn = torch.tensor([[c, -s], [s, c]])
    matrix = torch.eye(3).unsqueeze(0)
    matrix[0, :2, :2], matrix[0, :2, 2] = turn, center - turn @ center
    ddf = affine_ddf(matrix, [41, 45])
    moving = textured((41, 45))
    fixed = warp(moving, ddf, padding="zeros")
    optimize = FieldOptimization(10, 0.5, regularity_weight=5.0)
    assert (optimize(None, moving, fixed, ddf) - ddf).abs().max() < 0.2
    near = ddf + wave((41, 45), 0.8)
    found = optimize(None, moving, fixed, near)
    content = (fixed != 0).expand_as(ddf)
    assert (found - ddf)[content].abs().mean() < 0.3 * (near - ddf)[content].abs().mean()
    assert folding_fraction(found).item() == 0.0


def test_where_coarse_levels_lead_astray_the_fine_one_goes_alone() -> None:
    """Coarse structure says six voxels, fine structure says nothing moved: only the fine level counts that."""
    led_astray = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6, generator=generator), (48, 48), mode="bicubic")
        fine = torch.rand(1, 1, 48, 48, generator=generator)
        moving, fixed = coarse.roll(6, dims=2) + 2 * fine, coarse + 2 * fine
        start, flat = torch.zeros(1, 2, 48, 48), torch.zeros(1, 2, 2)
        optimize = FieldOptimization(15, similarity=LocalCorrelationLoss(2.0))
        chain = start
        for factor in optimize._factors([48, 48]):
            chain = optimize._level(factor, moving, fixed, chain, flat, None)
        before, after = (optimize._loss(moving, fixed, field, 0 * start, None) for field in (start, chain))
        ddf = optimize(None, moving, fixed, start)
        assert optimize._loss(moving, fixed, ddf, 0 * start, None) <= before + 1e-6
        led_astray += bool(after > before)
    assert led_astray > 0, "otherwise this proves nothing"


def test_defaults_follow_the_similarity() -> None:
    assert FieldOptimization(similarity=LocalCorrelationLoss(2.0)).regularity_weight == 0.15
    assert FieldOptimization(similarity=MINDSSCLoss()).regularity_weight == 0.05
    assert FieldOptimization(similarity=MINDSSCLoss(), regularity_weight=0.7).regularity_weight == 0.7


# ---- the network


def network_loss(net: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> float:
    """The loss of training, in both directions, written out."""
    with torch.no_grad():
        there, back = net(moving, fixed), net(fixed, moving)
        loss = LocalCorrelationLoss(4.0)(warp(moving, there, padding="zeros"), fixed)
        loss = loss + LocalCorrelationLoss(4.0)(warp(fixed, back, padding="zeros"), moving)
        return (loss + 1.5 * GradICONLoss(seed=0)(there, back)).item()


@pytest.mark.parametrize("fixed_shape", [(24, 24), (19, 26)])
def test_training_the_copy_improves_the_pair(fixed_shape: tuple[int, int]) -> None:
    net, moving, fixed = small_network(), textured((24, 24)), textured(fixed_shape, seed=3)
    start = net(moving, fixed).detach()
    compare = LocalCorrelationLoss(4.0)

    def similarity(ddf: torch.Tensor) -> float:
        return compare(warp(moving, ddf, padding="zeros"), fixed).item()

    ddf = NetworkOptimization(20, 1e-3)(net, moving, fixed, start)
    assert ddf.shape == start.shape and not torch.equal(ddf, start)
    assert similarity(ddf) < similarity(start) - 0.02


def test_one_step_is_the_papers() -> None:
    """Compare with Adam and the loss of training written out, on a network in eval mode."""
    net, moving, fixed = small_network(), textured((20, 22)), textured((20, 22), seed=3)
    start = net(moving, fixed).detach()
    trained = copy.deepcopy(net)
    adam = torch.optim.Adam(trained.parameters(), lr=1e-4)
    there, back = trained(moving, fixed), trained(fixed, moving)
    compare = LocalCorrelationLoss(4.0)
    loss = compare(warp(moving, there, padding="zeros"), fixed) + compare(warp(fixed, back, padding="zeros"), moving)
    (loss + 1.5 * GradICONLoss(seed=0)(there, back)).backward()
    adam.step()
    assert network_loss(trained, moving, fixed) < network_loss(net, moving, fixed)
    ddf = NetworkOptimization(1, 1e-4)(net, moving, fixed, start)
    assert (ddf - trained(moving, fixed)).abs().max() < 1e-4 < (ddf - start).abs().max()


def test_the_network_is_left_as_it_was() -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    net.train()
    list(net.children())[0].eval()
    frozen = next(net.parameters()).requires_grad_(False)
    with_gradient = list(net.parameters())[-1]
    with_gradient.grad = torch.ones_like(with_gradient)
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    start = copy.deepcopy(net).eval()(moving, fixed).detach()
    ddf = NetworkOptimization(3, 1e-3)(net, moving, fixed, start)
    assert not torch.equal(ddf, start)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [p for p in net.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in net.parameters() if p is not with_gradient)
    assert torch.equal(with_gradient.grad, torch.ones_like(with_gradient))


def test_a_frozen_network_is_trained_as_well() -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    start = net(moving, fixed).detach()
    expected = NetworkOptimization(2, 1e-3)(net, moving, fixed, start)
    assert torch.equal(NetworkOptimization(2, 1e-3)(net.requires_grad_(False), moving, fixed, start), expected)


def test_networks_without_both_and_scripted_ones() -> None:
    moving, fixed = textured((16, 16)), textured((16, 16), seed=3)
    unet = randomized(DisplacementUNet(2, channels=(4, 8)))
    start = unet(moving, fixed).detach()
    plain, scripted = (NetworkOptimization(2, 1e-3)(n, moving, fixed, start) for n in (unet, torch.jit.script(unet)))
    assert (plain - scripted).abs().max() < 1e-5 < (plain - start).abs().max()


def test_a_weight_reaches_both_directions() -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    start = net(moving, fixed).detach()
    seen: list[torch.Tensor | None] = []

    def similarity(pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(weight)
        return LocalCorrelationLoss()(pred, target, weight)

    weight = (fixed != 0).float()
    NetworkOptimization(1, similarity=similarity)(net, moving, fixed, start, weight)
    back = net(fixed, moving).detach()
    assert len(seen) == 4 and torch.equal(seen[0], weight)
    assert (seen[1] - warp(weight, back, padding="zeros")).abs().max() < 1e-4
    seen.clear()
    NetworkOptimization(1, similarity=similarity)(net, moving, fixed, start)
    assert seen == [None] * 4


def test_a_region_carried_off_the_moving_grid_counts_one_way_only() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(100.0))

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return self.shift.expand(1, 2, *fixed.shape[2:])

    moving, fixed = textured((16, 16)), textured((16, 16), seed=3)
    start = torch.full((1, 2, 16, 16), 100.0)
    assert torch.equal(NetworkOptimization(2)(Far(), moving, fixed, start, torch.ones_like(fixed)), start)


def test_networks_without_weights_are_refused() -> None:
    image = textured((16, 16))
    for network in (nn.Identity(), lambda moving, fixed: fixed, None):
        with pytest.raises(ValueError, match="a network with weights to train, got"):
            NetworkOptimization(1)(network, image, image, torch.zeros(1, 2, 16, 16))


# ---- both


@pytest.mark.parametrize("kind", BOTH)
def test_no_steps_change_nothing(kind: Any) -> None:
    moving, fixed, ddf = pair((16, 16))
    assert torch.equal(kind(steps=0)(small_network(), moving, fixed, ddf), ddf)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("number", [0, 1])
def test_any_gradient_mode_of_the_caller(number: int, mode: Any) -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    start = net(moving, fixed).detach()
    expected = optimizations()[number](net, moving, fixed, start, torch.ones_like(fixed))
    assert not torch.equal(expected, start)
    with mode():
        made_here = [tensor.clone() for tensor in (moving, fixed, start, torch.ones_like(fixed))]
        copied = copy.deepcopy(net)
        ddf = optimizations()[number](copied, *made_here)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert not ddf.requires_grad and (ddf - expected).abs().max() < 1e-5


@pytest.mark.parametrize("number", [0, 1])
def test_calls_are_repeatable_and_leave_arguments_and_random_state(number: int) -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    start = net(moving, fixed).detach()
    optimize, weight = optimizations()[number], torch.ones_like(fixed)
    arguments = [tensor.clone() for tensor in (moving, fixed, start, weight)]
    options, random = copy.deepcopy(vars(optimize)), torch.get_rng_state()
    first = optimize(net, moving, fixed, start, weight)
    other = optimize(net, fixed, moving, -start)  # a call between leaves no trace
    assert torch.equal(optimize(net, moving, fixed, start, weight), first) and not torch.equal(other, first)
    assert all(torch.equal(a, b) for a, b in zip(arguments, (moving, fixed, start, weight)))
    assert torch.equal(torch.get_rng_state(), random)
    assert {k: v for k, v in vars(optimize).items() if not isinstance(v, nn.Module)} == {
        k: v for k, v in options.items() if not isinstance(v, nn.Module)
    }


@pytest.mark.parametrize("learning_rate", [1e-6, 0.1, 1e6])
def test_a_field_is_never_worse_than_its_start(learning_rate: float) -> None:
    moving, fixed, ddf = pair((20, 24))

    def loss(field: torch.Tensor) -> float:
        return (
            LocalCorrelationLoss(3.0)(warp(moving, field, padding="zeros"), fixed) + 0.3 * DiffusionLoss()(field)
        ).item()

    for start in (torch.zeros_like(ddf), ddf):
        assert folding_fraction(start) == 0
        improved = FieldOptimization(10, learning_rate, regularity_weight=0.3)(None, moving, fixed, start)
        assert loss(improved) <= loss(start) + 1e-6
        assert torch.isfinite(improved).all()
    identical = FieldOptimization(5, 1.0)(None, fixed, fixed, torch.zeros_like(ddf))
    assert torch.equal(identical, torch.zeros_like(ddf))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("first_bad", [0, 2])
def test_a_loss_that_is_not_finite_ends_it(number: int, bad: float, first_bad: int) -> None:
    net, moving, fixed = small_network(), textured((20, 20)), textured((20, 20), seed=3)
    start = net(moving, fixed).detach()
    calls = 0

    def similarity(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = LocalCorrelationLoss()(pred, target)
        return loss * bad if calls > first_bad * (1 + number) else loss

    ddf = optimizations(20, similarity=similarity)[number](net, moving, fixed, start)
    # The field's other level ends at its first loss, two more compare its start and end, and where they do not say that
    # the end is as good, the fine level tries alone.
    assert calls == ((first_bad + 1) * 2 if number else first_bad + 1 + (4 if bad != bad else 3))
    assert torch.isfinite(ddf).all()
    if first_bad == 0:
        assert torch.equal(ddf, start)


@pytest.mark.parametrize("number", [0, 1])
def test_gradients_that_are_not_finite_do_no_harm(number: int) -> None:
    net, moving, fixed = small_network(), textured((16, 16)), textured((16, 16), seed=3)
    start = net(moving, fixed).detach()

    def similarity(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (0.0 * (pred - pred.detach()).abs().sum()).sqrt() + (pred - target).square().mean()

    assert torch.equal(optimizations(similarity=similarity)[number](net, moving, fixed, start), start)


@pytest.mark.parametrize("number", [0, 1])
def test_meta_tensors_and_half_precision(number: int) -> None:
    net, moving, fixed = small_network(), textured((16, 16)), textured((16, 16), seed=3)
    start = net(moving, fixed).detach()
    optimize = optimizations()[number]
    expected = optimize(net, moving, fixed, start)
    meta = optimize(net, *(MetaTensor(tensor) for tensor in (moving, fixed, start)))
    assert torch.equal(meta, expected) and not isinstance(meta, MetaTensor)
    half = [tensor.bfloat16() for tensor in (moving, fixed, start)]
    single = optimize(net, *half)
    assert single.dtype == torch.float32
    assert torch.equal(single, optimize(net, *(tensor.float() for tensor in half)))


def test_a_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    moving, fixed, ddf = pair((16, 16))
    quiet = FieldOptimization(2)(None, moving, fixed, ddf)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(FieldOptimization(2, progress=True)(None, moving, fixed, ddf), quiet)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("steps", [-1, 2.5, "50", True])
def test_bad_numbers_of_steps_are_refused(kind: Any, steps: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{kind.__name__} expects steps to be an integer of at least 0, got {steps!r}"
    ):
        kind(steps=steps)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(FieldOptimization, name) for name in ("learning_rate", "regularity_weight", "folding_weight", "smoothing")]
    + [(NetworkOptimization, name) for name in ("learning_rate", "consistency_weight")],
)
@pytest.mark.parametrize("value", [-0.1, nan, inf])
def test_bad_numbers_are_refused(kind: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} expects {option} to be finite and at least 0, got {value}"):
        kind(**{option: value})


@pytest.mark.parametrize("option", ["spacing", "levels"])
@pytest.mark.parametrize("count", [0, 1.5, -2])
def test_bad_counts_are_refused(option: str, count: Any) -> None:
    with pytest.raises(ValueError, match=f"expects {option} to be an integer of at least 1, got {count}"):
        FieldOptimization(**{option: count})


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("moving", "fixed", "ddf"),
    [
        ((2, 1, 8, 8), (2, 1, 8, 8), (2, 2, 8, 8)),
        ((1, 1, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8)),
        ((1, 1, 8, 8), (1, 1, 8, 8), (1, 2, 8, 9)),
        ((1, 1, 8, 8), (1, 1, 8, 8), (1, 3, 8, 8)),
        ((1, 1, 8), (1, 1, 8), (1, 1, 8)),
        ((1, 1, 8, 8, 8), (1, 1, 8, 8), (1, 2, 8, 8)),
        ((8,), (8,), (8,)),
    ],
)
def test_shapes_that_do_not_fit_are_named(kind: Any, moving: Any, fixed: Any, ddf: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} expects moving .* got ") as info:
        kind(1)(small_network(), torch.rand(moving), torch.rand(fixed), torch.zeros(ddf))
    assert f"got {list(moving)}, {list(fixed)} and {list(ddf)}" in str(info.value)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("weight", [torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 9), torch.full((1, 1, 8, 8), -1.0)])
def test_bad_weights_are_named(kind: Any, weight: torch.Tensor) -> None:
    image = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"{kind.__name__} expects weight"):
        kind(1)(small_network(), image, image, torch.zeros(1, 2, 8, 8), weight)
