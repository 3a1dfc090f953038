"""The displacement U-Net: published layers, identity at the start, any shape, joint translations."""

from __future__ import annotations

import pytest
import torch
from helpers_networks import content, count, place, randomized

from equireg.networks import DisplacementUNet


def small(dims: int, dtype: torch.dtype = torch.float32, channels: tuple[int, ...] = (4, 8), in_channels: int = 1):
    return randomized(DisplacementUNet(dims, in_channels, channels), dtype)


@pytest.mark.parametrize(("dims", "expected"), [(2, 4_756_902), (3, 17_670_229)])
def test_published_parameter_counts(dims: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(DisplacementUNet(dims)) == expected


@pytest.mark.parametrize("dims", [2, 3])
def test_identity_at_the_start(dims: int) -> None:
    net = DisplacementUNet(dims, 1, (4, 8))
    one, two = content(*[9] * dims), content(*[9] * dims, seed=1)
    for training in (True, False):
        assert (net.train(training)(one, two) == 0).all()
    net(one, two).sum().backward()
    assert net.head.weight.grad.abs().max() > 0  # and it can leave it
    assert randomized(net)(one, two).abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (5, 3), (17, 33), (13, 7), (64, 9), (1, 1, 1), (1, 2, 5), (17, 3, 7), (8, 4, 16)]
)
def test_any_shape(shape: tuple[int, ...], training: bool) -> None:
    net = small(len(shape), channels=(3, 4, 5, 4, 3), in_channels=2).train(training)
    ddf = net(content(*shape, channels=2, batch=2), content(*shape, channels=2, batch=2, seed=1))
    assert ddf.shape == (2, len(shape), *shape)
    assert torch.isfinite(ddf).all() and (ddf != 0).any()


def test_moving_image_of_another_shape_keeps_its_voxel_indices() -> None:
    net, moving, fixed = small(2), content(9, 14), content(11, 12, seed=1)
    assert torch.equal(net(moving, fixed), net(place(moving[..., :12], (11, 12), (0, 0)), fixed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dims", "shape"), [(2, (56, 52)), (3, (40, 44, 36))])
def test_joint_translations_by_the_stride(dims: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exact where the border is out of reach; not so for other shifts, nor when one image moves alone."""
    net, stride, reach = small(dims, dtype), 4, 8
    size = [n - 4 * stride for n in shape]
    one, two = content(*size, dtype=dtype), content(*size, seed=1, dtype=dtype)

    @torch.no_grad()
    def inner(moving_by: int, fixed_by: int) -> torch.Tensor:
        """Return the answer where the fixed content lies, without what the border reaches."""
        moving = place(one, shape, [2 * stride + moving_by] * dims)
        fixed = place(two, shape, [2 * stride + fixed_by] * dims)
        start = 2 * stride + fixed_by + reach
        return net(moving, fixed)[(..., *[slice(start, start + n - 2 * reach) for n in size])]

    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    reference = inner(0, 0)
    assert reference.std() > 0.1
    for by in (stride, -stride):
        assert (inner(by, by) - reference).abs().max() < tolerance
        assert (inner(by, 0) - reference - by).abs().max() > 1.0
    assert (inner(1, 1) - reference).abs().max() > 1e-2


def test_an_empty_sample_is_left_alone() -> None:
    net = small(2).train()
    moving, fixed = content(9, 8, batch=3), content(9, 8, batch=3, seed=1)
    moving[0], fixed[2] = 0.0, 0.0
    moving.requires_grad_()
    ddf = net(moving, fixed)
    assert (ddf[[0, 2]] == 0).all() and (ddf[1] != 0).any()
    ddf.square().sum().backward()
    for gradient in [moving.grad, *(p.grad for p in net.parameters())]:
        assert gradient is not None and torch.isfinite(gradient).all()
    assert moving.grad[1].abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3 .*got 1 and 1"),
        ({"spatial_dims": 3.0}, "got 3.0 and 1"),
        ({"spatial_dims": 2, "in_channels": 0}, "got 2 and 0"),
        ({"spatial_dims": 2, "in_channels": None}, "got 2 and None"),
        ({"spatial_dims": 2, "channels": 16}, "at least one positive width, got 16"),
        ({"spatial_dims": 2, "channels": (4, 8.0)}, r"got \(4, 8.0\)"),
        ({"spatial_dims": 2, "channels": ()}, r"at least one positive width, got \(\)"),
        ({"spatial_dims": 2, "channels": (4, 0)}, r"got \(4, 0\)"),
    ],
)
def test_unet_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DisplacementUNet(**arguments)
