"""From images on any grids to what the network sees and back, on oblique, anisotropic, permuted and mirrored grids."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from helpers_bundle import blob
from helpers_grids import centered, grid, image
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.networks.layers import GaussianFilter
from test_world import random_affine

from equireg.fields import identity_grid
from equireg.networks.affine import affine_ddf
from equireg.preparation import PreparePaird, RestorePaird, _smoothed, network_axes, network_image, restored_field
from equireg.spaces import apply_affine
from equireg.world import affine_inverse, field_affine, sample_transform

SHAPES = {2: ((23, 31), (29, 19)), 3: ((17, 23, 14), (21, 15, 19))}


def pair(dims: int, seed: int) -> dict[str, MetaTensor]:
    """Return images on unrelated grids around one place."""
    shapes = dict(zip(("moving", "fixed"), SHAPES[dims]))
    affines = {
        key: centered(grid(dims, seed + n), shape, [9.0 * n] * dims) for n, (key, shape) in enumerate(shapes.items())
    }
    return {key: image(shape, affines[key], seed) for key, shape in shapes.items()}


def mapping_of(item: dict, transform: torch.Tensor) -> torch.Tensor:
    """Return the prediction `(D, *padded shape)` by which the network would say that points move by an affine."""
    dims = item["fixed"].dim() - 1
    shape = item["image"].shape[1:]
    matrix = affine_inverse(field_affine(item["network_moving"])) @ transform @ field_affine(item["network_fixed"])
    index = torch.from_numpy(np.indices(shape)).double()
    shift = matrix[:dims, dims].reshape([-1] + [1] * dims)
    return torch.einsum("ij,j...->i...", matrix[:dims, :dims], index) + shift - index


@pytest.mark.parametrize("spacing", [None, 1.7])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dims", [2, 3])
def test_what_the_network_says_means_the_same_in_the_world(dims: int, seed: int, spacing: float | None) -> None:
    transform = random_affine(dims, seed)
    item = PreparePaird(spacing=spacing)(pair(dims, seed))
    ddf = mapping_of(item, transform)
    pred = torch.cat([ddf, torch.rand(1, *ddf.shape[1:])]).float()
    near = restored_field(pred, item["network_moving"], item["network_fixed"])
    expected = sample_transform([transform], near.affine, near.shape[1:])
    assert (near - expected).abs().max() < 1e-3  # float32 predictions of up to 100 voxels
    # On the file's grid, where it lies inside what the network saw: beyond, the displacement at the border goes on.
    field = RestorePaird()({**item, "pred": pred})["fixed_to_moving"]
    fixed = item["fixed"]
    assert field.shape[1:] == fixed.shape[1:] and torch.allclose(field.affine, fixed.affine)
    expected = sample_transform([transform], fixed.affine, fixed.shape[1:])
    to_network = affine_inverse(field_affine(near)) @ field_affine(fixed)
    at = np.einsum("ij,j...->i...", to_network[:dims, :dims], np.indices(fixed.shape[1:]))
    at = at + to_network[:dims, dims].numpy().reshape([-1] + [1] * dims)
    inside = ((at >= 0) & (at <= np.reshape(near.shape[1:], [-1] + [1] * dims) - 1)).all(axis=0)
    assert inside.mean() > 0.5
    assert (field - expected).abs().as_tensor()[:, torch.from_numpy(inside)].max() < 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_an_initial_affine_is_part_of_the_answer(dims: int) -> None:
    initial = random_affine(dims, 5)
    plain, started = PreparePaird()(pair(dims, 0)), PreparePaird()({**pair(dims, 0), "initial_transform": initial})
    assert plain["image"].shape != started["image"].shape  # the network sees the moving image turned
    # Where the network answers that points stay where the initial affine has put them, the affine is the answer, also
    # beyond what the network saw.
    pred = mapping_of(started, torch.eye(dims + 1, dtype=torch.float64)).float()
    field = RestorePaird()({**started, "pred": pred})["fixed_to_moving"]
    assert (field - sample_transform([initial], field.affine, field.shape[1:])).abs().max() < 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_storage_order_and_canvas_change_nothing_the_network_sees(dims: int) -> None:
    shape = (16, 14, 12)[:dims]
    content = blob(shape, np.array(shape) / 2 - 0.5, 5.0)
    affine = centered(grid(dims, 3), shape, [0.0] * dims)
    whole = MetaTensor(torch.from_numpy(content)[None], affine=torch.from_numpy(affine))
    axes = network_axes(whole.affine, dims)
    seen = network_image(whole, axes)
    for order, signs in product(permutations(range(dims)), product([1, -1], repeat=dims)):
        stored = content.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
        turn = np.eye(4)
        turn[:dims, :dims] = 0
        for new, (old, sign) in enumerate(zip(order, signs)):
            turn[old, new], turn[old, 3] = sign, (shape[old] - 1 if sign < 0 else 0)
        padded = np.pad(stored, [(3, 5)] * dims)
        shift = np.eye(4)
        shift[:dims, 3] = -3
        again = MetaTensor(torch.from_numpy(padded.copy())[None], affine=torch.from_numpy(affine @ turn @ shift))
        other = network_image(again, network_axes(again.affine, dims))
        assert torch.equal(seen.as_tensor(), other.as_tensor())
        assert (seen.affine - other.affine).abs().max() < 1e-9


@pytest.mark.parametrize("spacing", [0.7, 1.3, 2.0])
def test_resampled_content_does_not_see_its_canvas(spacing: float) -> None:
    content = blob((20, 18, 16), (10, 9, 8), 7.0)
    one = MetaTensor(torch.from_numpy(content)[None], affine=torch.eye(4))
    other = MetaTensor(torch.from_numpy(np.pad(content, [(4, 0), (1, 6), (2, 2)]))[None], affine=torch.eye(4))
    axes = network_axes(one.affine, 3, spacing)
    a, b = network_image(one, axes), network_image(other, axes)
    assert a.shape == b.shape and (a - b).abs().max() < 1e-6
    assert (b.affine[:3, 3] - a.affine[:3, 3] - torch.tensor([4.0, 1.0, 2.0])).abs().max() < 1e-9


def test_resampling_keeps_places_and_values() -> None:
    """A blob, bright at one point of the world, is bright there on a turned grid of another spacing, too."""
    affine = centered(grid(3, 4, spacing=(1.0, 1.2, 0.9)), (40, 40, 40), [3.0, -2.0, 5.0])
    index = np.indices((40, 40, 40)).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    bump = np.exp(-((world - np.array([[3.5], [-2.5], [4.5]])) ** 2).sum(axis=0) / (2 * 5.0**2)).reshape(40, 40, 40)
    values = MetaTensor(
        torch.from_numpy(np.where(bump > 0.02, bump, 0.0)).float()[None], affine=torch.from_numpy(affine)
    )
    seen = network_image(values, network_axes(torch.eye(4), 3, 2.0))
    seen_index = np.indices(seen.shape[1:]).reshape(3, -1)
    seen_world = seen.affine.numpy()[:3, :3] @ seen_index + seen.affine.numpy()[:3, 3:]
    weight = seen.as_tensor().numpy().flatten()
    center = (seen_world * weight).sum(axis=1) / weight.sum()
    assert np.abs(center - [3.5, -2.5, 4.5]).max() < 0.05
    assert seen.max() > 0.9 and torch.allclose(seen.affine[:3, :3], 2.0 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(70, 5), (1, 33), (9, 67, 34), (40, 3, 1)])
def test_smoothing_is_that_of_monai(shape: tuple[int, ...]) -> None:
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    sigmas = [2.3, 0.7, 1.1][: len(shape)]
    expected = GaussianFilter(len(shape), sigmas)(maps[None])[0]
    torch.testing.assert_close(_smoothed(maps, sigmas), expected, rtol=0, atol=1e-6)
    assert torch.equal(_smoothed(maps, [0.0] * len(shape)), maps)


def test_coarser_voxels_average_what_they_cover() -> None:
    stripes = torch.zeros(1, 40, 40)
    stripes[:, 4:36:2, 4:36] = 1.0  # every second line: sampled without smoothing they would be all or nothing
    stripes[:, 4:36, 4:36] += 1.0
    seen = network_image(MetaTensor(stripes, affine=torch.eye(4)), network_axes(torch.eye(4), 2, 4.0))
    inner = seen[0, 2:-2, 2:-2]
    assert inner.min() > 0.35 and inner.max() < 0.65
    thin = torch.zeros(1, 40, 40)
    thin[0, 20, 5:35] = 1.0
    thin[0, 5:35, 20] = 2.0
    assert network_image(MetaTensor(thin, affine=torch.eye(4)), network_axes(torch.eye(4), 2, 3.0)).any()


def test_masks_and_backgrounds_say_what_content_is() -> None:
    scan = MetaTensor(torch.full((1, 12, 12), -1024.0), affine=torch.eye(4))
    scan[0, 3:9, 2:7] = torch.arange(30.0).reshape(6, 5) - 10
    assert network_image(scan, torch.eye(3), background=-1024.0).shape == (1, 6, 5)
    mask = torch.zeros(1, 12, 12, dtype=torch.bool)
    mask[0, 4:6, 3:9] = True
    masked = network_image(scan, torch.eye(3), mask, background=-1024.0)
    assert masked.shape == (1, 2, 6) and bool((masked > 0).all())  # all of the mask, background values too
    item = PreparePaird(background=(-1024.0, 0.0))({"moving": scan, "fixed": scan, "fixed_mask": mask})
    assert item["network_moving"].shape == (1, 6, 5) and item["network_fixed"].shape == (1, 2, 6)


def test_pairs_pass_through_a_data_loader() -> None:
    item = pair(3, 1)
    batch = next(iter(DataLoader(Dataset([item], PreparePaird()), batch_size=1)))
    pred = torch.zeros(1, 4, *batch["image"].shape[2:])
    (out,) = [RestorePaird()(one) for one in decollate_batch({**batch, "pred": pred})]
    direct = PreparePaird()(item)
    expected = RestorePaird()({**direct, "pred": pred[0]})["fixed_to_moving"]
    assert torch.equal(out["fixed_to_moving"], expected)


def test_the_network_grid_is_nearest_to_ras() -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.1, -2.0, 0.0], [0.0, 0.2, 3.0], [1.0, 0.0, 0.1]])
    axes = network_axes(affine, 3)
    assert torch.allclose(axes[:3, 0], torch.tensor([2.0, -0.2, 0.0], dtype=torch.float64))
    assert torch.allclose(axes[:3, 2], torch.tensor([0.1, 0.0, 1.0], dtype=torch.float64))
    assert network_axes(torch.eye(4), 3, 1.005)[0, 0] == 1.0 and network_axes(torch.eye(4), 3, 1.02)[0, 0] == 1.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: network_axes(torch.eye(4), 3, (1.0, 2.0)), "3 positive numbers"),
        (lambda: network_axes(torch.eye(4), 3, (2.0,)), "3 positive numbers"),
        (lambda: network_axes(torch.eye(4), 2, 0.0), "2 positive numbers"),
        (lambda: network_image(MetaTensor(torch.zeros(1, 4, 4)), torch.eye(3)), "nothing to register"),
        (lambda: network_image(MetaTensor(torch.ones(1, 4, 4)), torch.eye(3)), "varies"),
        (lambda: network_image(image((4, 4), np.eye(4)), 1e-4 * torch.eye(3)), "more than it can take"),
        (lambda: PreparePaird()({**pair(2, 0), "moving": pair(3, 0)["moving"]}), "as many axes"),
        (lambda: PreparePaird(background=(1.0, 2.0, 3.0)), "for each image"),
        (lambda: restored_field(torch.zeros(3, 4, 4), pair(2, 0)["moving"], pair(2, 0)["fixed"]), "covers"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dims", [2, 3])
def test_an_affine_answer_goes_on_beyond_what_the_network_saw(dims: int) -> None:
    """Content in a corner of a wide canvas, seen at another spacing, and an answer that turns and shears."""
    generator = torch.Generator().manual_seed(0)
    canvas = torch.zeros(1, *(40, 44, 36)[:dims])
    canvas[(0, *[slice(5 + k, 19 + k) for k in range(dims)])] = 0.2 + torch.rand(*[14] * dims, generator=generator)
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims, :dims] = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))[0]
    matrix[:dims, dims] = torch.tensor([3.0, -2.0, 5.0][:dims])
    affine = torch.diag(torch.tensor([1.5] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([10.0, -20.0, 5.0])
    whole = MetaTensor(canvas, affine=affine)
    item = PreparePaird(spacing=2.0)({"moving": whole, "fixed": whole})
    seen_moving, seen_fixed = (field_affine(item[f"network_{name}"]) for name in ("moving", "fixed"))
    shape = list(item["network_fixed"].shape[1:])
    assert any(2.0 * seen < 1.5 * size for seen, size in zip(shape, canvas.shape[1:])), "otherwise nothing is beyond"
    field = RestorePaird()({**item, "pred": affine_ddf(matrix[None], shape)[0]})["fixed_to_moving"]
    world = seen_moving @ matrix @ torch.linalg.inv(seen_fixed)
    own = field_affine(whole)
    index = identity_grid(list(canvas.shape[1:]), torch.float64)[0]
    points = apply_affine(own, index)
    moved = apply_affine(own, index + field.as_tensor().double())
    assert (moved - apply_affine(world, points)).abs().max() < 1e-3  # millimeters, of a field in float32
