"""The self-similarity descriptor against a loop over voxels, analytic values and the invariances it promises."""

from __future__ import annotations

import pytest
import torch

from equireg.losses import LocalCorrelationLoss, MINDSSCLoss
from equireg.mind import check_weight

SHAPES = [(9, 12), (6, 7, 8)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blobs(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth structure everywhere, from 0 to 1, `(1, 1, *shape)`."""
    noise = random(1, 1, *shape, seed=seed)
    for axis in range(2, noise.dim()):
        for _ in range(12):
            noise = (noise.roll(1, axis) + noise.roll(-1, axis) + 2 * noise) / 4
    return (noise - noise.min()) / (noise.max() - noise.min())


def reference(image: torch.Tensor, radius: int, dilation: int) -> torch.Tensor:
    """Descriptors of one channel `(*shape)` voxel by voxel, straight from the definition; sorted, `(*shape, n)`."""
    dims = image.dim()
    units = torch.cat([torch.eye(dims, dtype=torch.long), -torch.eye(dims, dtype=torch.long)])
    pairs = [(a, b) for k, a in enumerate(units) for b in units[:k] if (a - b).square().sum() == 2]
    box = torch.cartesian_prod(*[torch.arange(-radius, radius + 1)] * dims)
    limit = torch.tensor(image.shape) - 1

    def at(points: torch.Tensor) -> torch.Tensor:
        return image[tuple(points.clamp(torch.zeros_like(limit), limit).T)]

    distances = torch.stack(
        [
            torch.stack([(at(x + dilation * a + box) - at(x + dilation * b + box)).square().mean() for a, b in pairs])
            for x in torch.cartesian_prod(*[torch.arange(n) for n in image.shape])
        ]
    )
    distances = distances - distances.amin(dim=1, keepdim=True)
    variance = distances.mean(dim=1, keepdim=True)
    variance = variance.clamp(0.001 * variance.mean(), 1000 * variance.mean())
    return torch.exp(-distances / variance).sort(dim=1).values.reshape(*image.shape, -1)


@pytest.mark.parametrize(("radius", "dilation"), [(2, 2), (1, 1), (0, 3)])
@pytest.mark.parametrize("shape", [(9, 12), (5, 4, 6), (1, 7)])
def test_descriptor_equals_the_definition(shape: tuple[int, ...], radius: int, dilation: int) -> None:
    image = random(1, 1, *shape)
    image[..., :4] = 0.3  # a flat region: the clamp is at work
    descriptor = MINDSSCLoss(radius, dilation).descriptor(image)
    assert descriptor.shape == (1, {2: 4, 3: 12}[len(shape)], *shape)
    expected = reference(image[0, 0], radius, dilation)
    # The order of the pairs is free; the sorted values are not, and both images use the same order.
    assert (descriptor[0].movedim(0, -1).sort(dim=-1).values - expected).abs().max() < 1e-12
    assert descriptor.amax(dim=1).min() == 1 and descriptor.min() >= 0


def test_pairs_of_neighbors_keep_their_places() -> None:
    """Turning the image permutes the entries: of a ramp along one axis, pairs across that axis see nothing."""
    ramp = torch.arange(11.0, dtype=torch.float64).reshape(1, 1, 1, 1, 11).expand(1, 1, 11, 11, 11)
    inner = MINDSSCLoss(1, 2).descriptor(ramp)[0, :, 5, 5, 5]
    # d is 0 for the 4 pairs within the plane and 4 (a step of 2) for the 8 others: mean 8/3, exp(-3/2).
    assert inner.sort().values.tolist() == pytest.approx([0.22313016014843] * 8 + [1.0] * 4, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_of_images_that_are_equal_up_to_contrast_is_zero(shape: tuple[int, ...]) -> None:
    image, loss = random(2, 3, *shape), MINDSSCLoss()
    assert loss(image, image).item() == 0.0
    for scale, offset in ((0.3, 0.5), (-1.0, 1.0), (-250.0, 40.0)):
        assert loss(image, scale * image + offset).item() < 1e-20
        assert loss(image.float(), (scale * image + offset).float()).item() < 1e-9
    other = random(2, 3, *shape, seed=1)
    assert loss(image, other).item() > 0.01
    assert loss(image, other).item() == pytest.approx(loss(other, image).item(), abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_over_channels_and_the_weighted_mean_over_voxels(shape: tuple[int, ...]) -> None:
    a, b, loss = random(2, 3, *shape), random(2, 3, *shape, seed=1), MINDSSCLoss(1, 1)
    apart = [loss(a[i : i + 1, c : c + 1], b[i : i + 1, c : c + 1]).item() for i in range(2) for c in range(3)]
    assert loss(a, b).item() == pytest.approx(sum(apart) / 6, abs=1e-14)
    weight = random(2, 1, *shape, seed=2)
    squares = (loss.descriptor(a) - loss.descriptor(b)).square().mean(dim=1).reshape(a.shape)
    expected = ((weight * squares).sum() / (3 * weight.sum())).item()
    assert loss(a, b, weight).item() == pytest.approx(expected, abs=1e-14)
    assert loss(a, b, torch.full_like(weight, 7.0)).item() == pytest.approx(loss(a, b).item(), abs=1e-14)


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    a, b, weight = random(1, 2, *shape), random(1, 2, *shape, seed=1), random(1, 1, *shape, seed=2)
    loss = MINDSSCLoss(radius=1, dilation=1)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, weight), (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_flat_images_and_flat_regions_are_finite(value: float, dtype: torch.dtype) -> None:
    loss = MINDSSCLoss()
    flat = torch.full((1, 1, 12, 12, 12), value, dtype=dtype)
    half = flat.clone()
    half[..., 6:] = random(12, 12, 6).to(dtype)
    for pred, target in ((flat, flat), (flat, half), (half, flat), (half, half.flip(2))):
        pred = pred.clone().requires_grad_()
        result = loss(pred, target)
        result.backward()
        assert torch.isfinite(result) and torch.isfinite(pred.grad).all()
    assert (loss.descriptor(flat) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_single(dtype: torch.dtype) -> None:
    a, b = random(1, 1, 16, 16).to(dtype), random(1, 1, 16, 16, seed=1).to(dtype)
    expected = MINDSSCLoss()(a.double(), b.double()).item()
    assert MINDSSCLoss()(a, b).dtype == torch.float32
    assert MINDSSCLoss()(a, b).item() == pytest.approx(expected, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert MINDSSCLoss()(a.float(), b.float()).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "remap",
    [lambda x: 1 - x, lambda x: (x - 0.5).abs(), lambda x: torch.sin(7 * x)],
    ids=["inverted", "folded", "sine"],
)
def test_finds_a_shift_between_contrasts_where_local_correlation_fails(remap) -> None:
    image = blobs(48, 48)
    shifts = [(i, j) for i in range(-4, 5) for j in range(-4, 5)]
    crop = (..., slice(8, -8), slice(8, -8))

    def best(loss) -> tuple[int, int]:
        values = [loss(remap(image).roll(s, (2, 3))[crop], image[crop]).item() for s in shifts]
        return shifts[values.index(min(values))]

    assert best(MINDSSCLoss()) == (0, 0)
    assert best(LocalCorrelationLoss()) != (0, 0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="radius >= 0 and dilation >= 1, got -1 and 2"):
        MINDSSCLoss(radius=-1)
    with pytest.raises(ValueError, match="radius >= 0 and dilation >= 1, got 2 and 0"):
        MINDSSCLoss(dilation=0)
    with pytest.raises(ValueError, match=r"one shape, got \[1, 1, 4, 4\] and \[1, 1, 4, 5\]"):
        MINDSSCLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"2 or 3 spatial axes, got \[1, 1, 4\]"):
        MINDSSCLoss()(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 2, 4, 4), r"weight of shape \(B, 1, \*spatial\) .* got \[2, 2, 4, 4\]"),
        (torch.ones(1, 1, 4, 4), r"got \[1, 1, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4), "somewhere above 0, got values from 0 to 0"),
        (torch.full((2, 1, 4, 4), -1.0), "not negative .* got values from -1 to -1"),
        (torch.full((2, 1, 4, 4), float("nan")), "finite.* got values from nan"),
        (torch.full((2, 1, 4, 4), float("inf")), "finite.* got values from inf"),
    ],
)
def test_bad_weights_are_named(weight: torch.Tensor, message: str) -> None:
    image = torch.rand(2, 2, 4, 4)
    for loss in (MINDSSCLoss(), LocalCorrelationLoss()):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} expects .*{message}"):
            loss(image, image, weight)
    with pytest.raises(ValueError, match=message):
        check_weight(weight, image, "somebody")
    check_weight(None, image, "somebody")
