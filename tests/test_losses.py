"""Losses against hand-made values, slow references, gradcheck, and the hosts that call them."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import BendingEnergyLoss, GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss, SSIMLoss
from monai.losses import DiffusionLoss as MonaiDiffusionLoss
from monai.metrics import LossMetric
from scipy.ndimage import correlate1d, map_coordinates

from equireg.fields import identity_grid, invert, warp
from equireg.handlers import RegularityWarmup
from equireg.losses import (
    CorrespondenceLoss,
    DiffusionLoss,
    GradICONLoss,
    LabeledSimilarity,
    LocalCorrelationLoss,
    RegistrationLoss,
)

SHAPES = [(23,), (21, 18), (19, 7, 20)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth_ddf(shape, seed=0, size=1.0, batch=1, dtype=torch.float64):
    """A few waves per axis, `size` voxels high."""
    phases = random(batch, len(shape), len(shape), *[1] * len(shape), seed=seed, dtype=dtype) * 6.28
    waves = identity_grid(list(shape), dtype=dtype)[:, None] * (4.0 / max(shape)) + phases
    return size * torch.sin(waves).mean(dim=2)


# ---- local correlation


def reference_lncc(a, b, sigma=4, squared=False, eps=1e-5):
    """One channel in numpy, with scipy's correlation; the window is written out tap by tap."""
    taps = np.array([np.exp(-0.5 * (k / sigma) ** 2) for k in range(-2 * sigma, 2 * sigma + 1)])
    assert sigma != 4 or len(taps) == 17

    def blur(x):
        for axis in range(x.ndim):
            x = correlate1d(x, taps / taps.sum(), axis=axis, mode="constant", cval=0.0)
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = np.maximum(blur(a * a) - mean_a**2, 0), np.maximum(blur(b * b) - mean_b**2, 0)
    cc = (blur(a * b) - mean_a * mean_b) / np.sqrt((var_a + eps) * (var_b + eps))
    return 1 - np.mean(cc**2 if squared else cc)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("sigma", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_local_correlation_equals_scipy(shape, sigma, squared):
    a, b = random(2, 3, *shape, dtype=torch.float64), random(2, 3, *shape, seed=1, dtype=torch.float64)
    b[:, :, :5] = a[:, :, :5]
    expected = np.mean(
        [reference_lncc(x.numpy(), y.numpy(), sigma, squared) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]
    )
    assert LocalCorrelationLoss(sigma, squared)(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert LocalCorrelationLoss(sigma, squared)(a.float(), b.float()).item() == pytest.approx(expected, abs=1e-5)


def test_local_correlation_range_and_sign():
    image = random(1, 1, 40, 40)
    loss, squared = LocalCorrelationLoss(), LocalCorrelationLoss(squared=True)
    assert loss(image, image).item() == pytest.approx(0.0, abs=1e-3)  # eps keeps it off exact zero
    assert loss(image, -image).item() == pytest.approx(2.0, abs=1e-3)
    assert squared(image, -image).item() == pytest.approx(0.0, abs=1e-3)
    assert loss(image, torch.zeros_like(image)).item() == 1.0
    # Unrelated images; zero-mean, because the edge against the outside is a feature that positive images share.
    assert 0.9 < loss(image - 0.5, random(1, 1, 40, 40, seed=1) - 0.5).item() < 1.1
    assert loss(image, 0.3 * image).item() < 0.01


def test_local_correlation_is_finite_on_flat_windows():
    pred = torch.zeros(1, 1, 24, 24, 24, requires_grad=True)
    target = torch.full((1, 1, 24, 24, 24), 0.7)
    loss = LocalCorrelationLoss()(pred + 0.5, target)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("squared", [False, True])
def test_local_correlation_gradcheck(squared):
    a, b = random(1, 2, 5, 6, dtype=torch.float64), random(1, 2, 5, 6, seed=1, dtype=torch.float64)
    loss = LocalCorrelationLoss(sigma=1.0, squared=squared)
    assert torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_correlation_in_half_precision_and_autocast(dtype):
    a, b = random(1, 1, 16, 16).to(dtype), random(1, 1, 16, 16, seed=1).to(dtype)
    expected = LocalCorrelationLoss()(a.double(), b.double()).item()
    assert LocalCorrelationLoss()(a, b).item() == pytest.approx(expected, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LocalCorrelationLoss()(a.float(), b.float()).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_local_correlation_counts_where_the_weight_says(shape, squared):
    a, b = random(2, 3, *shape, dtype=torch.float64), random(2, 3, *shape, seed=1, dtype=torch.float64)
    loss, weight = LocalCorrelationLoss(2.0, squared), random(2, 1, *shape, seed=2, dtype=torch.float64)
    # The map of correlations, one voxel at a time: a weight of 1 there and 0 elsewhere.
    voxels = torch.eye(weight[0].numel(), dtype=torch.float64)[:: 2 if len(shape) == 1 else 37]
    voxels = voxels.reshape(-1, 1, 1, *shape).expand(-1, 2, 1, *shape)
    picked = sum(voxels)
    each = np.array([loss(a, b, voxel).item() for voxel in voxels])
    assert each.std() > 0.01 and loss(a, b, picked).item() == pytest.approx(each.mean(), abs=1e-12)
    # Linear in the weight, which samples and channels share.
    parts = [loss(a, b, w * weight) * (w * weight).sum() for w in (picked, 1 - picked)]
    assert loss(a, b, weight).item() == pytest.approx((sum(parts) / weight.sum()).item(), abs=1e-12)


def test_local_correlation_without_weight_and_with_a_constant_one():
    a, b = random(1, 1, 24, 24), random(1, 1, 24, 24, seed=1)
    assert torch.equal(LocalCorrelationLoss()(a, b), LocalCorrelationLoss()(a, b, None))
    constant = torch.full_like(a, 0.25)
    assert LocalCorrelationLoss()(a, b, constant).item() == pytest.approx(LocalCorrelationLoss()(a, b).item(), abs=1e-6)
    half = torch.zeros_like(a)
    half[:, :, :12] = 1.0
    a[:, :, :16] = b[:, :, :16]  # windows of two sigma, so that in the first rows they see nothing but equal voxels
    assert LocalCorrelationLoss(2.0)(a, b, half).item() < 1e-3 < 0.1 < LocalCorrelationLoss(2.0)(a, b).item()


def test_local_correlation_with_weight_gradcheck():
    a, b = random(1, 2, 5, 6, dtype=torch.float64), random(1, 2, 5, 6, seed=1, dtype=torch.float64)
    weight = random(1, 1, 5, 6, seed=2, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (a, b, weight))
    assert torch.autograd.gradcheck(LocalCorrelationLoss(sigma=1.0), inputs)


def test_local_correlation_is_not_monais():
    a, b = random(1, 1, 24, 24), random(1, 1, 24, 24, seed=1)
    other = LocalNormalizedCrossCorrelationLoss(2, kernel_size=13, kernel_type="gaussian")(a, b).item()
    assert abs(LocalCorrelationLoss(squared=True)(a, b).item() - (1 + other)) > 1e-3


def test_local_correlation_rejects():
    with pytest.raises(ValueError, match=r"got \[1, 1, 4, 4\] and \[1, 1, 4, 5\]"):
        LocalCorrelationLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="got -1"):
        LocalCorrelationLoss(sigma=-1)


# ---- diffusion


def test_diffusion_of_linear_ramps():
    matrix = random(3, 3, dtype=torch.float64)
    ddf = torch.einsum("ij,bj...->bi...", matrix, identity_grid([5, 6, 7], dtype=torch.float64))
    assert DiffusionLoss()(ddf).item() == pytest.approx(matrix.square().sum().item() / 3, abs=1e-12)
    assert MonaiDiffusionLoss()(ddf).item() == pytest.approx(matrix.square().sum().item() / 3, abs=1e-12)


def test_diffusion_sees_what_monai_steps_over():
    ddf = torch.zeros(1, 2, 8, 8)
    ddf[:, 0, ::2] = 1.0
    assert DiffusionLoss()(ddf).item() == 0.5
    assert MonaiDiffusionLoss()(ddf).item() == 0.0


def test_diffusion_ignores_singleton_axes():
    ddf = random(2, 2, 6, 1, dtype=torch.float64)
    assert DiffusionLoss()(ddf).item() == pytest.approx(ddf.diff(dim=2).square().mean().item(), abs=1e-15)
    point = torch.ones(1, 3, 1, 1, 1, requires_grad=True)
    DiffusionLoss()(point).backward()
    assert point.grad.abs().max().item() == 0.0


def test_diffusion_gradcheck_and_bad_input():
    assert torch.autograd.gradcheck(DiffusionLoss(), random(2, 2, 4, 5, dtype=torch.float64).requires_grad_())
    assert DiffusionLoss()(random(1, 2, 4, 5).half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"got \[1, 3, 4, 4\]"):
        DiffusionLoss()(torch.zeros(1, 3, 4, 4))


# ---- GradICON


def reference_gradicon(back, there, step, stride=1):
    """No noise, float64, sampling by scipy; `there` goes from moving to fixed, `back` returns."""

    def sample(ddf, points):
        return np.stack([map_coordinates(c, points, order=1, mode="nearest") for c in ddf])

    points = np.stack(np.meshgrid(*[np.arange(0, n, stride, dtype=float) for n in there.shape[1:]], indexing="ij"))

    def error(x):
        y = x + sample(there, x)
        return y + sample(back, y) - x

    total = 0.0
    for axis in range(len(there)):
        ahead = points.copy()
        ahead[axis] += step
        total += np.mean(((error(ahead) - error(points)) / step) ** 2)
    return total


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shapes", [((9, 12), (9, 12)), ((9, 12), (14, 7)), ((6, 7, 8), (8, 5, 6)), ((1, 7), (1, 9))])
def test_gradicon_equals_scipy(shapes, stride):
    back, there = (smooth_ddf(shape, seed, 2.0, batch=2) for seed, shape in enumerate(shapes))
    expected = np.mean([reference_gradicon(b.numpy(), t.numpy(), 0.2, stride) for b, t in zip(back, there)])
    loss = GradICONLoss(noise=0.0, stride=stride)
    assert expected > 0.01 and loss(back, there).item() == pytest.approx(expected, rel=1e-9)
    assert loss(back.float(), there.float()).item() == pytest.approx(expected, rel=1e-3)


def test_gradicon_of_a_ramp():
    ramp = torch.zeros(1, 2, 10, 4, dtype=torch.float64)
    ramp[:, 0] = 0.3 * identity_grid([10, 4], dtype=torch.float64)[:, 0]
    # Half of the components, and nine of ten rows: beyond the last one the ddf is constant.
    assert GradICONLoss(noise=0.0)(ramp, torch.zeros_like(ramp)).item() == pytest.approx(0.09 / 2 * 0.9, abs=1e-12)


def test_gradicon_vanishes_for_shifts_and_shrinks_for_inverses():
    shift = torch.tensor([3.0, -20.0, 1.5]).reshape(1, 3, 1, 1, 1)
    assert GradICONLoss()(shift.expand(1, 3, 8, 9, 7), -shift.expand(1, 3, 6, 6, 6)).item() < 1e-8
    ddf = smooth_ddf((32, 32), size=2.0)
    good = GradICONLoss(seed=0)(ddf, invert(ddf)).item()
    assert good < 0.02 * GradICONLoss(seed=0)(ddf, torch.zeros_like(ddf)).item()


def test_gradicon_noise_and_seed():
    a, b = smooth_ddf((12, 12), 0, 2.0), smooth_ddf((12, 12), 1, 2.0)
    state = torch.get_rng_state()
    assert GradICONLoss(seed=3)(a, b) == GradICONLoss(seed=3)(a, b) != GradICONLoss(seed=4)(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert GradICONLoss()(a, b) != GradICONLoss()(a, b)


def test_gradicon_gradcheck():
    # A step that crosses no voxel center keeps the loss differentiable.
    inputs = smooth_ddf((4, 5), 0, 0.3).requires_grad_(), smooth_ddf((5, 3), 1, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(GradICONLoss(seed=0), inputs)


def test_gradicon_rejects():
    field = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"ddf_moving_to_fixed .* got \[1, 1, 4, 4\]"):
        GradICONLoss()(field, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"got \[1, 2, 4, 4\] and \[1, 3, 4, 4, 4\]"):
        GradICONLoss()(field, torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="step > 0"):
        GradICONLoss(step=0)
    with pytest.raises(ValueError, match="0.2, 1.0 and 0"):
        GradICONLoss(stride=0)


# ---- the joined loss


def host_tensors(shape=(20, 18), channels=1, two_way=True, dtype=torch.float32):
    """A prediction in the host contract, and its four or two parts."""
    dims = len(shape)
    pair = random(2, 2 * channels, *shape, dtype=dtype)
    moving, fixed = pair[:, :channels], pair[:, channels:]
    ddf, ddf_back = smooth_ddf(shape, 0, batch=2, dtype=dtype), smooth_ddf(shape, 1, batch=2, dtype=dtype)
    parts = [ddf, warp(moving, ddf), ddf_back, warp(fixed, ddf_back)][: 4 if two_way else 2]
    pred = torch.cat(parts, dim=1)
    assert pred.shape[1] == (dims + channels) * (2 if two_way else 1)
    return pred, pair, parts, moving, fixed


@pytest.mark.parametrize("shape, channels", [((20, 18), 1), ((20, 18), 2), ((9, 8, 10), 1)])
def test_registration_loss_terms(shape, channels):
    pred, pair, parts, moving, fixed = host_tensors(shape, channels)
    ddf, moved, ddf_back, moved_back = parts
    similarity, regularity, consistency = LocalCorrelationLoss(), DiffusionLoss(), GradICONLoss(seed=0)
    loss = RegistrationLoss(similarity, regularity, 1.5, consistency, 2.5)
    match = similarity(moved, fixed) + similarity(moved_back, moving)
    smooth = 1.5 * (regularity(ddf) + regularity(ddf_back)) / 2
    expected = match + smooth + 2.5 * consistency(ddf, ddf_back)
    assert loss(pred, pair).item() == pytest.approx(expected.item(), abs=1e-6)
    one_way = loss(pred[:, : len(shape) + channels], pair)
    assert one_way.item() == pytest.approx((similarity(moved, fixed) + 1.5 * regularity(ddf)).item(), abs=1e-6)
    assert RegistrationLoss(similarity)(pred, pair).item() == pytest.approx(match.item(), abs=1e-6)


def test_registration_loss_skips_terms_of_weight_zero():
    def never(*_):
        raise AssertionError("a term of weight 0 was computed")

    pred, pair, *_ = host_tensors()
    loss = RegistrationLoss(torch.nn.MSELoss(), never, 0.0, never, 0.0)
    assert loss(pred, pair).item() > 0


@pytest.mark.parametrize(
    "similarity",
    [
        torch.nn.L1Loss(),
        SSIMLoss(2),
        GlobalMutualInformationLoss(),
        LocalNormalizedCrossCorrelationLoss(2, kernel_size=5),
        LocalCorrelationLoss(squared=True),
    ],
)
def test_registration_loss_takes_monai_losses(similarity):
    pred, pair, *_ = host_tensors()
    pred.requires_grad_()
    value = RegistrationLoss(similarity, BendingEnergyLoss())(MetaTensor(pred), MetaTensor(pair))
    value.backward()
    assert not isinstance(value, MetaTensor) and value.dim() == 0
    assert torch.isfinite(pred.grad).all() and pred.grad[:, :2].abs().max() > 0 and pred.grad[:, 2].abs().max() > 0


def test_registration_loss_gradcheck_and_unchanged_arguments():
    pred, pair, *_ = host_tensors((6, 5), dtype=torch.float64)
    before = pred.clone(), pair.clone()
    loss = RegistrationLoss(LocalCorrelationLoss(1.0), DiffusionLoss(), 1.0, GradICONLoss(seed=0))
    assert torch.autograd.gradcheck(loss, (pred.requires_grad_(), pair))
    assert torch.equal(pred, before[0]) and torch.equal(pair, before[1]) and not list(loss.state_dict())


@pytest.mark.parametrize(
    "pred, label",
    [
        ((1, 4, 8, 8), (1, 2, 8, 8)),
        ((1, 9, 8, 8), (1, 2, 8, 8)),
        ((1, 3, 8, 8), (1, 3, 8, 8)),
        ((1, 3, 8, 8), (1, 2, 8, 9)),
        ((2, 3, 8, 8), (1, 2, 8, 8)),
        ((1, 3, 8), (1, 2, 8, 8)),
        ((3,), (1, 2)),
        ((3,), (2,)),
    ],
)
def test_registration_loss_rejects(pred, label):
    with pytest.raises(ValueError, match="RegistrationLoss expects label .* got .*") as info:
        RegistrationLoss(torch.nn.MSELoss())(torch.zeros(pred), torch.zeros(label))
    assert f"got {list(label)} and {list(pred)}" in str(info.value)


def test_from_configuration():
    parser = ConfigParser(
        {
            "loss": {
                "_target_": "equireg.losses.RegistrationLoss",
                "similarity": {"_target_": "equireg.losses.LocalCorrelationLoss", "sigma": 2.0, "squared": True},
                "regularity": {"_target_": "equireg.losses.DiffusionLoss"},
                "regularity_weight": 1.5,
                "consistency": {"_target_": "equireg.losses.GradICONLoss", "seed": 0},
                "consistency_weight": 1.5,
            },
            "handler": {"_target_": "equireg.handlers.RegularityWarmup", "loss": "@loss", "warmup_epochs": 2},
        }
    )
    loss, handler = parser.get_parsed_content("loss"), parser.get_parsed_content("handler")
    pred, pair, *_ = host_tensors()
    assert isinstance(loss, RegistrationLoss) and handler.loss is loss
    assert loss.similarity.sigma == 2.0 and loss.similarity.squared and torch.isfinite(loss(pred, pair))


def test_as_a_metric():
    metric = LossMetric(LocalCorrelationLoss(sigma=2))
    a, b = random(1, 1, 12, 12), random(1, 1, 12, 12, seed=1)
    metric(a, b)
    assert metric.aggregate().item() == pytest.approx(LocalCorrelationLoss(sigma=2)(a, b).item(), abs=1e-7)


# ---- the schedule


def scheduled(warmup_epochs):
    """A trainer that records the two weights of each epoch."""
    loss = RegistrationLoss(torch.nn.MSELoss(), DiffusionLoss(), 1.5, GradICONLoss(), 2.5)
    seen = []
    trainer = Engine(
        lambda engine, _: seen.append((engine.state.epoch, loss.regularity_weight, loss.consistency_weight))
    )
    RegularityWarmup(loss, warmup_epochs).attach(trainer)
    return trainer, seen


WARM, COLD = (1.5, 0.0), (0.0, 2.5)


@pytest.mark.parametrize("warmup_epochs", [0, 2, 9])
def test_warmup_switches_after_its_epochs(warmup_epochs):
    trainer, seen = scheduled(warmup_epochs)
    trainer.run([0, 0], max_epochs=4)
    expected = [(epoch, *(WARM if epoch <= warmup_epochs else COLD)) for epoch in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert seen == expected


@pytest.mark.parametrize("done, warmup_epochs", [(1, 2), (2, 2), (3, 2)])
def test_warmup_after_resume(done, warmup_epochs):
    trainer, seen = scheduled(warmup_epochs)
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", done))
    trainer.run([0], max_epochs=4)
    assert seen == [(e, *(WARM if e <= warmup_epochs else COLD)) for e in range(done + 1, 5)]


def test_warmup_resumes_from_a_state_dict():
    trainer, seen = scheduled(2)
    trainer.load_state_dict({"epoch_length": 1, "max_epochs": 4, "iteration": 3})
    trainer.run([0])
    assert seen == [(4, *COLD)]


def test_warmup_rejects():
    with pytest.raises(ValueError, match="got .*None"):
        RegularityWarmup(RegistrationLoss(torch.nn.MSELoss(), DiffusionLoss()), 1)
    loss = RegistrationLoss(torch.nn.MSELoss(), DiffusionLoss(), 1.0, GradICONLoss(), 1.0)
    with pytest.raises(ValueError, match="got -1"):
        RegularityWarmup(loss, -1)
    loss.consistency_weight = 0.0
    with pytest.raises(ValueError, match=r"weights \(1.0, 0.0\)"):
        RegularityWarmup(loss, 1)


# ---- labels beside images


def test_labeled_similarity_takes_each_channel_for_what_it_is() -> None:
    pred, target = torch.rand(2, 5, 6, 7), torch.rand(2, 5, 6, 7)
    images, labels = torch.nn.MSELoss(), torch.nn.L1Loss()
    loss = LabeledSimilarity(images, labels, weight=3.0, image_channels=2, unused_channels=1)
    expected = images(pred[:, 1:3], target[:, 1:3]) + 3.0 * labels(pred[:, 3:], target[:, 3:])
    torch.testing.assert_close(loss(pred, target), expected)
    pred[:, 0] += 1
    torch.testing.assert_close(loss(pred, target), expected)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 9)])
def test_labeled_similarity_names_what_it_expects(shape: tuple[int, ...]) -> None:
    loss = LabeledSimilarity(torch.nn.MSELoss(), torch.nn.L1Loss())
    with pytest.raises(ValueError, match=rf"more than 1 channels, got \[{', '.join(map(str, shape))}\]"):
        loss(torch.zeros(shape), torch.zeros(1, shape[1], 8, 8))
    with pytest.raises(ValueError, match="got 0 and 0"):
        LabeledSimilarity(torch.nn.MSELoss(), torch.nn.L1Loss(), image_channels=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_correspondence_loss_weighs_distances_where_they_are_known(dims: int) -> None:
    target = torch.randn(2, dims + 1, *(5, 4, 6)[:dims], dtype=torch.float64)
    target[:, -1] = 0
    assert CorrespondenceLoss()(torch.randn_like(target), target) == 0  # nothing is known
    target[0, -1, 1] = 1
    pred = target.clone()
    pred[0, :dims, 1] += torch.tensor([2.0, 2.0, 0.0][:dims]).reshape([-1] + [1] * (dims - 1))  # sqrt(8), and
    pred[1] += 100.0  # where nothing is known
    assert CorrespondenceLoss()(pred, target).item() == pytest.approx(2.0)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: CorrespondenceLoss()(p, target), pred)
    with pytest.raises(ValueError, match="D \\+ 1"):
        CorrespondenceLoss()(target[:, :-1], target[:, :-1])
