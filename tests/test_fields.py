"""Fields against MONAI, scipy and algebra, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from equireg import fields
from equireg.fields import compose, identity_grid, invert, jacobian_determinant, resize, warp

SHAPES = [(9, 14), (7, 5, 6)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ddf(shape: tuple[int, ...], size: float = 6.0, seed: int = 1, batch: int = 2, dtype=torch.float32):
    """Displacements from -size / 2 to size / 2: many of them point outside."""
    return size * (random(batch, len(shape), *shape, seed=seed, dtype=dtype) - 0.5)


def smooth_ddf(shape: tuple[int, ...], seed: int = 0, size: float = 2.0, batch: int = 2) -> torch.Tensor:
    """A few waves, `size` voxels high."""
    dims = len(shape)
    phases = 6.28 * random(batch, dims, dims, *[1] * dims, seed=seed, dtype=torch.float64)
    return size * torch.sin(identity_grid(list(shape), torch.float64)[:, None] * (3.0 / max(shape)) + phases).mean(2)


def reference_warp(image: torch.Tensor, ddf: torch.Tensor, mode: str, padding: str) -> np.ndarray:
    """Sample with scipy, which needs no normalized coordinates."""
    points = (identity_grid(list(ddf.shape[2:]), ddf.dtype) + ddf).double().numpy()
    outside = {"border": "nearest", "zeros": "grid-constant"}[padding]
    order = {"linear": 1, "nearest": 0}[mode]
    return np.stack(
        [
            np.stack([map_coordinates(c.double().numpy(), at, order=order, mode=outside) for c in sample])
            for sample, at in zip(image, points)
        ]
    )


# ---- identity


def test_identity_grid_holds_the_indices() -> None:
    grid = identity_grid([2, 3, 4], torch.float64)
    assert grid.shape == (1, 3, 2, 3, 4) and grid.dtype == torch.float64
    np.testing.assert_array_equal(grid[0].numpy(), np.indices((2, 3, 4)))


# ---- warp


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8), (6, 1), (5, 1, 4), (1, 1, 7)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_warp_equals_monai(shape: tuple[int, ...], mode: str) -> None:
    image, ddf = random(2, 3, *shape), random_ddf(shape)
    expected = Warp(mode={"linear": "bilinear"}.get(mode, mode), padding_mode="border")(image, ddf)
    torch.testing.assert_close(warp(image, ddf, mode=mode), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("moving", "fixed"),
    [((9, 14), (12, 5)), ((3, 8), (1, 9)), ((7, 5, 6), (4, 9, 5)), ((1, 6), (4, 6)), ((5, 1, 4),) * 2],
)
def test_warp_equals_scipy_for_other_shapes(moving, fixed, mode: str, padding: str) -> None:
    image = random(2, 3, *moving, dtype=torch.float64)
    ddf = random_ddf(fixed, dtype=torch.float64)
    expected = reference_warp(image, ddf, mode, padding)
    np.testing.assert_allclose(warp(image, ddf, mode, padding).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_zero_field_returns_the_image(shape: tuple[int, ...], padding: str) -> None:
    image = random(2, 3, *shape, dtype=torch.float64)
    zero = torch.zeros(2, len(shape), *shape, dtype=torch.float64)
    torch.testing.assert_close(warp(image, zero, padding=padding), image, rtol=0, atol=1e-14)
    torch.testing.assert_close(warp(image.float(), zero.float(), padding=padding), image.float(), rtol=0, atol=2e-6)
    assert torch.equal(warp(image, zero, mode="nearest", padding=padding), image)


def test_whole_voxel_shift_along_each_axis() -> None:
    image = random(1, 1, 6, 7, 8, dtype=torch.float64)
    for axis, by in [(0, 2), (1, -3), (2, 1)]:
        ddf = torch.zeros(1, 3, 6, 7, 8, dtype=torch.float64)
        ddf[:, axis] = by
        index = torch.arange(image.shape[2 + axis]) + by
        inside = ((index >= 0) & (index < image.shape[2 + axis])).reshape([-1 if k == axis else 1 for k in range(3)])
        expected = image.index_select(2 + axis, index.clamp(0, image.shape[2 + axis] - 1))
        torch.testing.assert_close(warp(image, ddf), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(warp(image, ddf, padding="zeros"), expected * inside, rtol=0, atol=1e-13)


def test_zeros_is_the_infinite_background() -> None:
    """Half a voxel outside, half of the border's value is left; a canvas padded with background changes nothing."""
    image, ddf = torch.ones(1, 1, 3, 1), torch.zeros(1, 2, 3, 1)
    ddf[:, 0] = 1.5
    assert warp(image, ddf, padding="zeros").flatten().tolist() == [1.0, 0.5, 0.0]
    ddf = random_ddf((3, 1), batch=1)
    padded = warp(torch.nn.functional.pad(image, [4, 4, 4, 4]), ddf + 4, padding="zeros")
    torch.testing.assert_close(warp(image, ddf, padding="zeros"), padded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moving", [(8, 16), (4, 8, 2)])  # powers of two: scaling rounds nothing
def test_far_origins_cost_no_precision(moving: tuple[int, ...], dtype: torch.dtype) -> None:
    """The fixed grid starts 2^16 voxels from the moving one, and displacements go back: index and they cancel."""
    image, far = random(1, 2, *moving, dtype=dtype), 2**16
    for axis in range(len(moving)):
        shape = [far + 8 if k == axis else 2 for k in range(len(moving))]
        ddf = torch.zeros(1, len(moving), *shape, dtype=dtype)
        ddf[:, axis] = -far
        moved = warp(image, ddf).narrow(2 + axis, far, 8)
        assert torch.equal(moved.narrow(2 + axis, 0, 2), image[(..., *[slice(0, 2)] * len(moving))])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_depends_on_whether_gradients_are_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image, ddf = random(2, 3, *shape, dtype=dtype), random_ddf(shape, dtype=dtype)
    reordered = ddf.movedim(1, -1).contiguous().movedim(-1, 1)  # the same values, otherwise in memory
    for padding in ("border", "zeros"):
        expected = warp(image, ddf.requires_grad_(), padding=padding).detach()
        with torch.no_grad():
            for field in (ddf, reordered, MetaTensor(ddf.detach())):
                assert torch.equal(torch.as_tensor(warp(image, field, padding=padding)), expected)
    expected = compose(ddf, ddf).detach()
    with torch.no_grad():
        assert torch.equal(compose(ddf, ddf), expected)
        assert torch.equal(compose(ddf.half(), ddf), ddf + warp(ddf.half(), ddf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_fields_sample_in_single_precision(dtype: torch.dtype) -> None:
    """Displacements may be rounded, but not the voxel indices they are added to."""
    image, ddf = random(1, 1, 700, 3), random_ddf((700, 3), batch=1).to(dtype)
    assert torch.equal(warp(image, ddf), warp(image, ddf.float()))
    assert torch.equal(compose(random_ddf((700, 3), batch=1), ddf), compose(random_ddf((700, 3), batch=1), ddf.float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_nearest_keeps_integer_labels(dtype: torch.dtype) -> None:
    label = torch.randint(0, 200, (2, 1, 9, 8)).to(dtype)
    moved = warp(label, random_ddf((11, 6)), mode="nearest")
    assert moved.dtype == dtype
    assert set(moved.unique().tolist()) <= set(label.unique().tolist())
    expected = reference_warp(label, random_ddf((11, 6)), "nearest", "border")
    np.testing.assert_array_equal(moved.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_nearest_keeps_large_labels(dtype: torch.dtype, padding: str) -> None:
    """Single precision would round all of these."""
    values = [2**24 + 1, 614454277, -(2**30) - 1, 2**31 - 1]
    label = torch.tensor(values, dtype=dtype).reshape(1, 1, 2, 2)
    moved = warp(label, torch.full((1, 2, 2, 2), 0.2), mode="nearest", padding=padding)
    assert moved.dtype == dtype and moved.flatten().tolist() == values


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes, which hold for others too
@torch.no_grad()
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("example", "others"), [((6, 5, 4), [(1, 5, 4), (6, 1, 3), (1, 1, 1)]), ((1, 4), [(6, 5)])])
def test_traced_warp_takes_axes_of_one_voxel(example, others, mode: str, padding: str) -> None:
    traced = torch.jit.trace(lambda i, d: warp(i, d, mode, padding), (random(2, 1, *example), random_ddf(example)))
    for shape in others:
        image, ddf = random(2, 1, *shape), random_ddf(shape, size=2.0)
        torch.testing.assert_close(traced(image, ddf), warp(image, ddf, mode, padding), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "ddf", "options", "message"),
    [
        (
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 3, 4, 4),
            {},
            r"D spatial axes, got \[1, 1, 4, 4\] and \[1, 3, 4, 4\]",
        ),
        (torch.zeros(1, 1, 4), torch.zeros(1, 2, 4, 4), {}, r"got \[1, 1, 4\]"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 2, 4, 4), {}, r"with one B .* got \[2, 1, 4, 4\]"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), {"mode": "cubic"}, "got 'cubic', 'border'"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), {"padding": "reflect"}, "got 'linear', 'reflect'"),
        (torch.zeros(1, 1, 4, 4).long(), torch.zeros(1, 2, 4, 4), {}, "floating point image .* got torch.int64"),
    ],
)
def test_warp_refuses(image: torch.Tensor, ddf: torch.Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp(image, ddf, **options)


# ---- compose


@pytest.mark.parametrize("shape", SHAPES)
def test_compose_maps_points_one_after_the_other(shape: tuple[int, ...]) -> None:
    """On affine fields, which linear interpolation reproduces: inner first, then outer."""
    dims = len(shape)
    outer_matrix, inner_matrix = 0.2 * (random(2, dims, dims, dtype=torch.float64) - 0.5)
    outer_shift, inner_shift = random(2, dims, 1, dtype=torch.float64) - 0.5

    def apply(matrix: torch.Tensor, shift: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return points + matrix @ points + shift

    points = identity_grid(list(shape), torch.float64).flatten(1).reshape(dims, -1)
    inner_points = apply(inner_matrix, inner_shift, points)
    expected = apply(outer_matrix, outer_shift, inner_points)

    margin = 6  # the outer field's grid reaches further, so that no point leaves it
    larger = [n + 2 * margin for n in shape]
    outer_grid = identity_grid(larger, torch.float64).reshape(dims, -1) - margin
    outer = (apply(outer_matrix, outer_shift, outer_grid) - outer_grid).reshape(1, dims, *larger)
    inner = (inner_points + margin - points).reshape(1, dims, *shape)
    got = compose(outer, inner).reshape(dims, -1) - margin
    torch.testing.assert_close(points + got, expected, rtol=0, atol=1e-12)


def test_compose_is_warping_in_a_row() -> None:
    image = smooth_ddf((40, 44), seed=5)  # smooth, so that two interpolations blur little
    outer, inner = smooth_ddf((40, 44)), smooth_ddf((30, 36), seed=3)
    in_a_row, at_once = warp(warp(image, outer), inner), warp(image, compose(outer, inner))
    assert (in_a_row - at_once)[..., 4:-4, 4:-4].abs().max() < 0.01
    swapped = warp(image, compose(inner, outer))[..., :30, :36]
    assert (in_a_row - swapped)[..., 4:-4, 4:-4].abs().max() > 0.01


# ---- resize


@pytest.mark.parametrize("shape", [(5, 7), (3, 8), (5, 3, 4), (9,)])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_resize_places_voxel_centers(shape: tuple[int, ...], factor: int) -> None:
    """An affine field stays that affine field of physical points, voxel centers half a voxel from the edge."""
    dims = len(shape)
    matrix, shift = random(dims, dims, dtype=torch.float64) - 0.5, random(dims, dtype=torch.float64)

    def coarse(points: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bj...->bi...", matrix, points) + shift.reshape(1, -1, *[1] * dims)

    fine = resize(coarse(identity_grid(list(shape), torch.float64)), factor)
    fine_shape = [factor * n for n in shape]
    assert list(fine.shape) == [1, dims, *fine_shape]
    half = (factor - 1) / 2
    # Outside the first and last coarse center the border continues, which is clamping the point to their range.
    points = (identity_grid(fine_shape, torch.float64) - half) / factor
    for k, n in enumerate(shape):
        points[:, k] = points[:, k].clamp(0, n - 1)
    torch.testing.assert_close(fine, factor * coarse(points), rtol=0, atol=1e-12)


def test_resize_refuses_factor_zero() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        resize(torch.zeros(1, 2, 3, 3), 0)


# ---- invert


@pytest.mark.parametrize("shape", [(33, 28), (17, 20, 18)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inverse_on_smooth_fields(shape: tuple[int, ...], seed: int) -> None:
    ddf = smooth_ddf(shape, seed)
    assert ddf.abs().max() > 1.0
    inverse = invert(ddf)
    # The map after its inverse is what the iteration solves, on every voxel; the other order pays for interpolation.
    assert compose(ddf, inverse).abs().max() < 1e-10
    inside = (..., *[slice(4, -4)] * len(shape))
    assert compose(inverse, ddf)[inside].abs().max() < 1e-2
    assert compose(ddf.float(), invert(ddf.float())).abs().max() < 1e-4


def test_inverse_on_another_shape() -> None:
    """The inverse lives on the moving grid, far from the fixed one."""
    ddf = smooth_ddf((20, 24)) + torch.tensor([30.0, -7.0]).reshape(1, 2, 1, 1)
    inverse = invert(ddf, [26, 19])
    assert inverse.shape == (2, 2, 26, 19)
    assert (inverse + torch.tensor([30.0, -7.0]).reshape(1, 2, 1, 1)).abs().max() < 2.5
    assert compose(ddf, inverse).abs().max() < 1e-10


# ---- jacobian


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_jacobian_of_affine_maps(dims: int, scheme: str) -> None:
    shape = [5, 4, 6][:dims]
    grid = identity_grid(shape, torch.float64)
    scaled = jacobian_determinant(0.1 * grid, scheme)
    assert list(scaled.shape) == [1, 1, *(shape if scheme == "central" else [n - 1 for n in shape])]
    torch.testing.assert_close(scaled, torch.full_like(scaled, 1.1**dims), rtol=0, atol=1e-12)
    matrix = random(3, dims, dims, dtype=torch.float64) - 0.5
    ddf = torch.einsum("bij,jk->bik", matrix, grid.reshape(dims, -1)).reshape(3, dims, *shape)
    expected = torch.linalg.det(matrix + torch.eye(dims)).reshape(3, 1, *[1] * dims)
    got = jacobian_determinant(ddf, scheme)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(9,), (9, 8), (9, 8, 7)])
def test_one_folded_voxel_counts_once(shape: tuple[int, ...]) -> None:
    ddf = torch.zeros(1, len(shape), *shape)
    ddf[(0, 0, *[4] * len(shape))] = 1.5
    assert (jacobian_determinant(ddf, "forward") <= 0).sum() == 1
    assert (jacobian_determinant(ddf, "central") <= 0).sum() == 0  # steps over it
    assert (jacobian_determinant(torch.zeros_like(ddf), "forward") == 1).all()


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_jacobian_of_short_axes(scheme: str) -> None:
    """An axis of one voxel does not change; one of two has one difference."""
    ddf = torch.zeros(1, 3, 1, 2, 5)
    ddf[:, 1, :, 1] = 0.5
    determinant = jacobian_determinant(ddf, scheme)
    assert determinant.shape == ((1, 1, 1, 2, 5) if scheme == "central" else (1, 1, 1, 1, 4))
    assert (determinant == 1.5).all()


@pytest.mark.parametrize("shape", [(9,), (1, 8), (2, 7), (9, 8), (5, 1, 6), (9, 8, 7)])
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_jacobian_is_the_same_in_parts(shape: tuple[int, ...], scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients it is computed some planes at a time; here also one, two or three."""
    ddf = random_ddf(shape, size=3.0)
    whole = jacobian_determinant(ddf.clone().requires_grad_(), scheme)
    for planes in (1, 2, 3):
        monkeypatch.setattr(fields, "_CACHED", planes * ddf[:, :, :1].numel() / torch.get_num_threads())
        assert torch.equal(jacobian_determinant(ddf, scheme), whole)


@pytest.mark.parametrize(
    ("shape", "scheme", "message"),
    [
        ((1, 2, 4, 4), "backward", "got 'backward'"),
        ((1, 2, 4, 4, 4), "central", r"got \[1, 2, 4, 4, 4\]"),
        ((1, 4, 2, 2, 2, 2), "central", "D from 1 to 3"),
    ],
)
def test_jacobian_refuses(shape: tuple[int, ...], scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jacobian_determinant(torch.zeros(shape), scheme)


# ---- derivatives, TorchScript, purity


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)])
def test_gradients(shape: tuple[int, ...]) -> None:
    def leaf(*size: int, seed: int) -> torch.Tensor:
        return (3 * random(*size, seed=seed, dtype=torch.float64) - 1.6).requires_grad_()

    dims = len(shape)
    image, ddf, other = leaf(1, 2, *shape, seed=1), leaf(1, dims, *shape, seed=2), leaf(1, dims, *shape, seed=3)
    for padding in ("border", "zeros"):
        assert torch.autograd.gradcheck(lambda i, d, p=padding: warp(i, d, padding=p), (image, ddf))
    assert torch.autograd.gradcheck(compose, (other, ddf))
    assert torch.autograd.gradcheck(lambda d: resize(d, 2), (ddf,))
    for scheme in ("central", "forward"):
        assert torch.autograd.gradcheck(lambda d, s=scheme: jacobian_determinant(d, s), (ddf,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (warp, {"mode": "linear", "padding": "zeros"}),
        (warp, {"mode": "nearest", "padding": "border"}),
        (compose, {}),
        (resize, {"factor": 3}),
        (invert, {"shape": None, "iterations": 5}),
        (jacobian_determinant, {"scheme": "central"}),
        (jacobian_determinant, {"scheme": "forward"}),
    ],
)
def test_scripted_equals_eager_and_arguments_stay(function: Callable, options: dict, shape: tuple[int, ...]) -> None:
    ddf = random_ddf(shape)
    arguments = {warp: (random(2, 2, *shape), ddf), compose: (random_ddf(shape, seed=4), ddf)}.get(function, (ddf,))
    before = [a.clone() for a in arguments]
    eager = function(*arguments, **options)
    assert torch.equal(torch.jit.script(function)(*arguments, **options), eager)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))


def test_scripted_identity_grid() -> None:
    scripted = torch.jit.script(identity_grid)([2, 5], torch.float64, None)
    assert torch.equal(scripted, identity_grid([2, 5], torch.float64))
