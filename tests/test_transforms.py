"""Transforms of pairs: values, metadata, untouched inputs and messages."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import helpers_grids
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose

from equireg import world
from equireg.fields import identity_grid
from equireg.io import write_displacement_field
from equireg.spaces import same_axes
from equireg.transforms import (
    InvertFieldd,
    MatchAxesd,
    NormalizeContent,
    NormalizeContentd,
    RestorePredd,
    SplitPred,
    SplitPredd,
    StackPair,
    StackPaird,
    WarpImaged,
    WarpLabel,
    WarpLabeld,
    WarpPointsd,
)

IMAGE_KEYS = ("moving", "fixed")


def affine(scale: float) -> torch.Tensor:
    return torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))


def content_image(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """An image `(1, 7, 9)` of 7 x 9 voxels, all content, of random order of magnitude `scale`."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(1, 2, (1, 7, 9))) * scale


def test_normalize_matches_percentiles_of_the_content_alone() -> None:
    image = torch.zeros(1, 20, 20, dtype=torch.float64)
    image[:, 5:12, 4:13] = content_image(scale=300.0)
    content = image[image != 0].numpy()
    low, high = np.percentile(content, [2, 90])
    result = NormalizeContent(2, 90)(image)
    expected = np.clip((image.numpy() - low) / (high - low), 1e-3, 1) * (image.numpy() != 0)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert torch.equal(result != 0, image != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_normalize_is_bit_identical_on_another_canvas(dtype: torch.dtype) -> None:
    content = content_image(1, 1e6).to(dtype)
    small = NormalizeContent()(content)
    for offset, shape in [((0, 0), (7, 30)), ((11, 3), (40, 13))]:
        canvas = torch.zeros(1, *shape, dtype=dtype)
        window = (slice(None), slice(offset[0], offset[0] + 7), slice(offset[1], offset[1] + 9))
        canvas[window] = content
        result = NormalizeContent()(canvas)
        assert torch.equal(result[window], small)
        assert result.count_nonzero() == small.count_nonzero() == 63


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1.0e12])
def test_normalize_does_not_depend_on_the_unit(scale: float) -> None:
    image = content_image()
    torch.testing.assert_close(NormalizeContent()(image * scale), NormalizeContent()(image), atol=1e-6, rtol=0)
    negative = NormalizeContent()(-image * scale)
    assert negative.min() == pytest.approx(1e-3) and negative.max() == 1


def test_normalize_survives_the_full_range_of_floats_and_numpy_integers() -> None:
    extreme = NormalizeContent(upper=100)(np.array([[-1.7e308, 0.0, 1.7e308]]))
    assert extreme.tolist() == [[pytest.approx(1e-3), 0.0, 1.0]]
    for kind in (np.uint8, np.uint16, np.int16, np.int64):
        result = NormalizeContent(upper=100)(np.array([[0, 50, 100, 150]], dtype=kind))
        torch.testing.assert_close(result, torch.tensor([[0, 1e-3, 0.5, 1.0]]))


def test_normalize_takes_content_from_any_channel_and_scales_channels_apart() -> None:
    image = torch.tensor([[0.0, 0.0, 5.0, 10.0], [0.0, 1.0, 0.0, 4.0]])
    result = NormalizeContent(upper=100)(image)
    torch.testing.assert_close(result, torch.tensor([[0.0, 1e-3, 0.5, 1.0], [0.0, 0.25, 1e-3, 1.0]]))
    ct = NormalizeContent(upper=100, background=-1024)(torch.tensor([[-1024.0, 0.0, 500.0, -500.0]]))
    torch.testing.assert_close(ct, torch.tensor([[0.0, 0.5, 1.0, 1e-3]]))


def test_normalize_of_masks_and_bad_input() -> None:
    mask = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert NormalizeContent()(mask).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="that varies, got a constant one in an image of shape \\[1, 4\\]"):
        NormalizeContent()(torch.full((1, 4), 7.0))
    # Coinciding percentiles of content that does vary are replaced by its range.
    mostly = torch.ones(1, 1000)
    mostly[0, 0] = 3
    assert NormalizeContent()(mostly).unique().tolist() == pytest.approx([1e-3, 1.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite values"):
            NormalizeContent()(torch.tensor([[1.0, bad]]))
    named = MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": "empty.nii.gz"})
    with pytest.raises(ValueError, match="nothing but background 0.0 in 'empty.nii.gz'"):
        NormalizeContent()(named)
    with pytest.raises(ValueError, match="0 <= lower < upper <= 100, got 50 and 10"):
        NormalizeContent(50, 10)


def test_normalize_keeps_metadata_and_its_input() -> None:
    image = MetaTensor(content_image(), affine=affine(2.0), meta={"filename_or_obj": "a.nii"})
    before = image.clone()
    item = {"moving": image, "other": 1}
    result = NormalizeContentd("moving")(item)
    assert isinstance(result["moving"], MetaTensor) and torch.equal(result["moving"].affine, affine(2.0))
    assert item["moving"] is image and torch.equal(image, before)
    assert NormalizeContentd(["moving", "absent"], allow_missing_keys=True)(item).keys() == item.keys()
    with pytest.raises(KeyError):
        NormalizeContentd("absent")(item)


def test_stack_pair_carries_the_metadata_of_the_fixed_image() -> None:
    moving = MetaTensor(torch.ones(2, 4, 5, 6), affine=affine(1.0), meta={"filename_or_obj": "moving.nii"})
    fixed = MetaTensor(torch.zeros(2, 4, 5, 6), affine=affine(3.0), meta={"filename_or_obj": "fixed.nii"})
    item = StackPaird()({"moving": moving, "fixed": fixed})
    pair = item["image"]
    assert pair.shape == (4, 4, 5, 6) and pair[:2].min() == 1 and pair[2:].max() == 0
    assert torch.equal(pair.affine, affine(3.0)) and pair.meta["filename_or_obj"] == "fixed.nii"
    assert item["label"] is pair
    pair.affine = affine(9.0)
    assert torch.equal(fixed.affine, affine(3.0)) and torch.equal(moving.affine, affine(1.0))
    assert set(StackPaird(image_key="pair", label_key=None)(item)) - set(item) == {"pair"}
    assert not isinstance(StackPair()(torch.ones(1, 2, 2), np.zeros((1, 2, 2), np.float32)), MetaTensor)


def test_stack_pair_pads_at_the_end_if_asked_to() -> None:
    moving, fixed = torch.rand(2, 4, 9, 3), MetaTensor(torch.rand(2, 6, 5, 3), affine=affine(3.0))
    pair = StackPaird(pad=True)({"moving": moving, "fixed": fixed})["image"]
    assert pair.shape == (4, 6, 9, 3) and torch.equal(pair.affine, fixed.affine)
    assert torch.equal(pair[:2, :4], moving) and torch.equal(pair[2:, :, :5], fixed.as_tensor())
    assert pair[:2, 4:].count_nonzero() == 0 == pair[2:, :, 5:].count_nonzero()
    assert torch.equal(StackPair(pad=True)(moving, moving), StackPair()(moving, moving))
    for bad in (torch.zeros(1, 4, 9, 3), torch.zeros(2, 4, 9)):
        with pytest.raises(ValueError, match="of one channel count, got moving"):
            StackPair(pad=True)(moving, bad)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 5)])
def test_stack_pair_refuses_differing_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="moving \\[1, 4, 5\\] and fixed \\[" + ", ".join(map(str, shape))):
        StackPair()(torch.zeros(1, 4, 5), torch.zeros(shape))


def test_split_pred_with_and_without_batch() -> None:
    pred = torch.arange(5 * 2 * 2 * 2.0).reshape(5, 2, 2, 2)
    ddf, moved = SplitPred()(pred)
    assert torch.equal(ddf, pred[:3]) and torch.equal(moved, pred[3:])
    ddf, moved = SplitPred(spatial_dims=3)(pred[None])
    assert torch.equal(ddf, pred[None, :3]) and torch.equal(moved, pred[None, 3:])
    item = SplitPredd(ddf_key="u", moved_key="m")({"pred": MetaTensor(pred, affine=affine(2.0))})
    assert torch.equal(item["u"].affine, affine(2.0)) and torch.equal(item["m"], pred[3:])
    for bad in (torch.zeros(2, 4, 4), torch.zeros(1, 1, 5, 4, 4, 4)):
        with pytest.raises(ValueError, match="SplitPred expects"):
            SplitPred(spatial_dims=None if bad.dim() == 3 else 3)(bad)


def test_warp_label_moves_by_the_ddf_and_keeps_type() -> None:
    label = torch.randint(0, 5, (1, 6, 7, 5), dtype=torch.uint8)
    pred = torch.zeros(4, 6, 7, 5)
    pred[0], pred[2], pred[3] = 2.0, -1.0, 77.0  # the fourth channel is the moved image
    moved = WarpLabel()(label, pred)
    expected = torch.zeros_like(label)
    expected[:, :4, :, 1:] = label[:, 2:, :, :-1]
    assert moved.dtype == torch.uint8 and torch.equal(moved, expected)
    half = WarpLabel("linear", "border")(label.float(), torch.full((3, 6, 7, 5), 0.5).half())
    assert half.dtype == torch.float32 and half[0, -1, -1, -1] == label[0, -1, -1, -1]
    with pytest.raises(ValueError, match="WarpLabel expects"):
        WarpLabel()(label, torch.zeros(2, 6, 7, 5))


def test_warp_labeld_takes_the_metadata_of_the_fixed_image_or_else_of_the_ddf() -> None:
    label = MetaTensor(torch.ones(1, 4, 4, 4), affine=affine(1.0))
    pred = MetaTensor(torch.zeros(4, 5, 5, 5), affine=affine(2.0))
    fixed = MetaTensor(torch.zeros(1, 5, 5, 5), affine=affine(3.0))
    item = {"moving_label": label, "pred": pred, "fixed": fixed}
    moved = WarpLabeld()(item)["moved_label"]
    assert moved.shape == (1, 5, 5, 5) and torch.equal(moved.affine, affine(3.0))
    assert torch.equal(WarpLabeld(meta_key=None)(item)["moved_label"].affine, affine(2.0))
    two = WarpLabeld(keys=["moving_label", "absent"], output=["a", "b"], allow_missing_keys=True)(item)
    assert "a" in two and "b" not in two
    with pytest.raises(ValueError, match="one output name per key"):
        WarpLabeld(keys=["a", "b"], output=["c", "c"])


def test_transforms_work_on_decollated_batches() -> None:
    items = [{"moving": content_image(i).float(), "fixed": content_image(i + 9).float()} for i in range(2)]
    for item in items:
        item["moving_label"] = (item["moving"] > 1.5).to(torch.uint8)
    batch = list_data_collate([StackPaird()(item) for item in items])
    batch["pred"] = torch.cat([torch.zeros(2, 2, 7, 9), batch["image"][:, :1]], dim=1)
    for item, out in zip(items, decollate_batch(batch)):
        out = Compose([WarpLabeld(), SplitPredd()])(out)
        assert torch.equal(out["moved_label"], item["moving_label"])
        assert torch.equal(out["moved"], item["moving"]) and out["ddf"].shape == (2, 7, 9)


def oblique(dims: int, seed: int, spacing: tuple[float, ...], center: tuple[float, ...], shape: tuple[int, ...]):
    """A `(4, 4)` affine of random direction whose middle voxel lies at `center`, millimeters RAS+."""
    direction, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dims, dims)))
    matrix = np.eye(4)
    matrix[:dims, :dims] = direction * spacing
    matrix[:dims, 3] = center - matrix[:dims, :dims] @ ((np.array(shape) - 1) / 2)
    return matrix


def on_grid(matrix: np.ndarray, shape: tuple[int, ...], values: torch.Tensor | None = None) -> MetaTensor:
    """A random image `(1, *shape)`, or one of given values, on a grid."""
    image = torch.rand(1, *shape) if values is None else values
    return MetaTensor(image, affine=torch.from_numpy(matrix), meta={"filename_or_obj": "fixed.nii.gz"})


def voxels_in_world(matrix: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """World positions `(D, *shape)`, millimeters RAS+."""
    dims = len(shape)
    index = identity_grid(list(shape), dtype=torch.float64)[0]
    origin = torch.from_numpy(matrix[:dims, 3]).reshape([-1] + [1] * dims)
    return torch.einsum("ij,j...->i...", torch.from_numpy(matrix[:dims, :dims]), index) + origin


def blob(matrix: np.ndarray, shape: tuple[int, ...], center: tuple[float, ...]) -> torch.Tensor:
    """A Gaussian `(1, *shape)` of 6 mm around a point of the world, of peak 1."""
    at = torch.tensor(center, dtype=torch.float64).reshape([-1] + [1] * len(shape))
    distance = ((voxels_in_world(matrix, shape) - at) ** 2).sum(dim=0, keepdim=True)
    return torch.exp(-distance / (2 * 6.0**2)).float()


# Grids of two images: spacing, middle and shape, all different, and so oblique that no axis is near one of the other.
GRIDS = {
    3: {
        "fixed": ((1.1, 0.8, 2.0), (12.0, -30.0, 7.0), (17, 20, 11)),
        "moving": ((1.5, 1.2, 0.9), (15, -28, 4), (14, 12, 19)),
    },
    2: {"fixed": ((1.1, 0.7), (12.0, -30.0), (27, 33)), "moving": ((0.6, 1.3), (14.0, -29.0), (36, 25))},
}


def grids(dims: int) -> tuple[np.ndarray, tuple[int, ...], np.ndarray, tuple[int, ...]]:
    """Return affine and shape of the fixed grid, then of the moving one."""
    (spacing, center, shape), moving = GRIDS[dims]["fixed"], GRIDS[dims]["moving"]
    return oblique(dims, 1, spacing, center, shape), shape, oblique(dims, 2, *moving), moving[2]


def write(image: torch.Tensor, path: Path) -> str:
    nib.save(nib.Nifti1Image(image[0].numpy().astype(np.float32), image.affine.numpy()), path)
    return str(path)


def resample_with_itk(moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, folder: Path) -> torch.Tensor:
    """Resample one image file to the grid of another through the field file, with SimpleITK alone."""
    sitk = pytest.importorskip("SimpleITK")
    field = write_displacement_field(ddf, fixed.affine, folder / "ddf.nii")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    images = [sitk.ReadImage(write(i, folder / "image.nii"), sitk.sitkFloat64) for i in (moving, fixed)]
    return torch.from_numpy(sitk.GetArrayFromImage(sitk.Resample(*images, transform, sitk.sitkLinear, -1.0)).T.copy())


def fake_prediction(pair: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, strength: float) -> torch.Tensor:
    """What a network might say of a pair: the offset between the middles of both, and a smooth warp."""
    dims, shape = pair.dim() - 1, pair.shape[1:]
    middles = [(torch.tensor(image.shape[1:]) - 1) / 2 for image in (moving, fixed)]
    coarse = strength * torch.randn(1, dims, *[3] * dims)
    mode = {2: "bilinear", 3: "trilinear"}[dims]
    smooth = torch.nn.functional.interpolate(coarse, size=tuple(shape), mode=mode, align_corners=True)[0]
    return torch.cat([smooth + (middles[0] - middles[1]).reshape([-1] + [1] * dims), pair[:1]])


def well_inside(field: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Where a ddf points into a grid of that shape, one voxel or more from its edge."""
    target = identity_grid(list(field.shape[1:]))[0] + field
    last = (torch.tensor(shape) - 2).reshape([-1] + [1] * len(shape))
    return ((target >= 1) & (target <= last)).all(dim=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("axes", ["differ", "agree"])
def test_written_field_moves_the_moving_file_as_the_prediction_did(axes: str, dims: int, tmp_path: Path) -> None:
    fixed_affine, fixed_shape, moving_affine, moving_shape = grids(dims)
    if axes == "agree":
        moving_affine[:dims, :dims] = fixed_affine[:dims, :dims]
    original = on_grid(moving_affine, moving_shape)
    original.meta["filename_or_obj"] = "moving.nii.gz"
    item = {"moving": original, "moving_raw": 1000 * original, "fixed": on_grid(fixed_affine, fixed_shape)}
    item = Compose([MatchAxesd(["moving", "moving_raw"]), StackPaird(pad=True)])(item)
    matched, fixed = item["moving_raw"], item["fixed"]
    assert item["image"].shape[1:] == tuple(map(max, matched.shape[1:], fixed_shape)) != fixed_shape
    item["pred"] = fake_prediction(item["image"], matched, fixed, strength=2.0)
    before = item["pred"].clone()
    item = RestorePredd()(item)

    assert item["ddf"].shape == (dims, *fixed_shape) and item["moved"].shape == (1, *fixed_shape)
    for result in (item["ddf"], item["moved"]):
        assert torch.equal(result.affine, fixed.affine) and result.meta["filename_or_obj"] == "fixed.nii.gz"
    assert torch.equal(item["pred"], before) and fixed.shape[1:] == fixed_shape
    window = (slice(dims), *(slice(size) for size in fixed_shape))
    inside = well_inside(before[window], matched.shape[1:])
    assert inside.float().mean() > 0.15
    # Where the axes agree already, the field must fit the file that came in.
    source = 1000 * original if axes == "agree" else matched
    theirs = resample_with_itk(source, fixed, item["ddf"], tmp_path)
    assert (theirs - item["moved"][0].as_tensor())[inside].abs().max() < 1e-4 * 1000
    assert theirs[inside].std() > 100  # there is something to agree on


@pytest.mark.parametrize("dims", [2, 3])
def test_known_translation_in_the_world_is_written_with_its_sign(dims: int, tmp_path: Path) -> None:
    step = (7.0, -4.0, 3.0)[:dims]
    fixed_affine, fixed_shape, _, _ = grids(dims)
    spacing, middle, small = GRIDS[dims]["moving"]
    moving_shape = tuple(3 * size for size in small)  # the blob ends within the image
    moving_affine = oblique(dims, 2, spacing, middle, moving_shape)
    here = GRIDS[dims]["fixed"][1]
    there = tuple(np.add(here, step))
    item = {
        "moving_raw": on_grid(moving_affine, moving_shape, blob(moving_affine, moving_shape, there)),
        "fixed": on_grid(fixed_affine, fixed_shape, blob(fixed_affine, fixed_shape, here)),
    }
    item = Compose([MatchAxesd("moving_raw"), StackPaird("moving_raw", pad=True)])(item)
    # The network sees arrays alone: the index of the blob in one, less that in the other.
    indices = [
        np.linalg.solve(image.affine[:dims, :dims], point - image.affine[:dims, 3].numpy())
        for image, point in [(item["moving_raw"], there), (item["fixed"], here)]
    ]
    constant = torch.from_numpy(indices[0] - indices[1]).float().reshape([-1] + [1] * dims)
    item["pred"] = torch.cat([constant.expand(dims, *item["image"].shape[1:]), item["image"][:1]])
    item = RestorePredd()(item)
    written = nib.load(write_displacement_field(item["ddf"], item["fixed"].affine, tmp_path / "ddf.nii")).get_fdata()
    lps = np.array([-7.0, 4.0, 3.0])[:dims]
    np.testing.assert_allclose(
        written.reshape(-1, dims), np.broadcast_to(lps, (item["ddf"][0].numel(), dims)), atol=1e-4
    )
    inside = well_inside(constant.expand(dims, *fixed_shape), item["moving_raw"].shape[1:])
    assert inside.all()
    # Two interpolations flatten a peak of 6 mm on voxels of up to 2 mm; a step of the wrong sign would cost 0.8.
    assert (item["moved"] - item["fixed"]).abs().max() < 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_match_axes_keeps_all_content_where_it_is(dims: int) -> None:
    fixed_affine, fixed_shape, moving_affine, moving_shape = grids(dims)
    shape = tuple(3 * size for size in moving_shape)  # the blob ends within the image
    center = tuple(voxels_in_world(moving_affine, shape)[(slice(None), *(size // 2 for size in shape))].tolist())
    moving = on_grid(moving_affine, shape, blob(moving_affine, shape, center))
    labels = torch.randint(1, 9, (1, *shape), dtype=torch.int16)
    item = {
        "moving": moving,
        "label": on_grid(moving_affine, shape, labels),
        "fixed": on_grid(fixed_affine, fixed_shape),
    }
    out = MatchAxesd(["moving", "label"], mode=["bilinear", "nearest"])(item)
    matched, label = out["moving"], out["label"]
    assert same_axes(matched.affine, fixed_affine, dims) and matched.shape == label.shape
    volumes = [abs(np.linalg.det(image.affine[:dims, :dims])) for image in (matched, moving)]
    assert float(matched.sum() * volumes[0]) == pytest.approx(float(moving.sum() * volumes[1]), rel=1e-3)
    expected = blob(matched.affine.numpy(), tuple(matched.shape[1:]), center)
    assert (matched - expected).abs().max() < 0.02  # linear interpolation flattens the peak
    # Nearest labels: no new values, none lost, and the ones of the moving corners still at their places.
    assert label.dtype == torch.int16 and set(label.unique().tolist()) == {0, *labels.unique().tolist()}
    assert out["fixed"] is item["fixed"] and item["moving"] is moving and torch.equal(item["label"], labels)
    world = voxels_in_world(moving_affine, shape)
    for corner in product(*((0, size - 1) for size in shape)):
        offset = world[(slice(None), *corner)].numpy() - matched.affine[:dims, 3].numpy()
        index = np.linalg.solve(matched.affine[:dims, :dims], offset)
        assert (index > -1e-6).all() and (index < np.array(matched.shape[1:]) - 1 + 1e-5).all()


def test_match_axes_leaves_images_of_these_axes_alone_and_no_others() -> None:
    fixed = on_grid(np.diag([1.0, 2.0, 3.0, 1.0]), (4, 4, 4))
    moved = fixed.affine.numpy().copy()
    moved[:3, 3] = 0.3, 500, -4
    item = {"moving": on_grid(moved, (9, 3, 5)), "fixed": fixed}
    assert MatchAxesd()(item)["moving"] is item["moving"]
    # Steps that differ by half a thousandth make a difference of 0.05 voxels at the far end, in a grid of one shape.
    near = on_grid(fixed.affine.numpy() * [1, 1 - 2e-4, 1, 1], (1, 100, 1), torch.arange(100.0).reshape(1, 1, 100, 1))
    matched = MatchAxesd()({"moving": near, "fixed": fixed})["moving"]
    assert same_axes(matched.affine, fixed.affine, 3, tolerance=1e-12)
    torch.testing.assert_close(matched[0, 0, 98, 0].item(), 98 / (1 - 2e-4), atol=1e-4, rtol=0)
    integers = MatchAxesd()({"moving": near.to(torch.int16), "fixed": fixed})["moving"]
    assert integers.dtype == torch.float32 and integers[0, 0, 98, 0] != integers[0, 0, 98, 0].round()


def test_match_axes_says_what_it_expects() -> None:
    fixed = on_grid(np.eye(4), (4, 4, 4))
    with pytest.raises(ValueError, match="data\\['moving'\\] to be a MetaTensor, .* got Tensor"):
        MatchAxesd()({"moving": torch.rand(1, 4, 4, 4), "fixed": fixed})
    with pytest.raises(ValueError, match="of shape \\[1, 4, 4, 4\\], got data\\['moving'\\] of shape \\[1, 4, 4\\]"):
        MatchAxesd()({"moving": on_grid(np.eye(4), (4, 4)), "fixed": fixed})
    with pytest.raises(ValueError, match="'bilinear' or 'nearest', got 'linear'"):
        MatchAxesd(mode="linear")
    with pytest.raises(ValueError):
        MatchAxesd(["moving", "label"], mode=["bilinear"] * 3)
    with pytest.raises(KeyError):
        MatchAxesd("absent")({"fixed": fixed})
    assert MatchAxesd("absent", allow_missing_keys=True)({"fixed": fixed}) == {"fixed": fixed}


def test_restore_pred_moves_labels_and_integer_images_by_whole_voxels() -> None:
    fixed = on_grid(np.diag([2.0, 2.0, 2.0, 1.0]), (3, 4, 5))
    moved_to = fixed.affine.numpy().copy()
    moved_to[:3, 3] = 6, 0, -2  # three voxels up the first axis, one down the last
    image = torch.randint(-900, 900, (2, 6, 4, 6), dtype=torch.int16)
    moving = on_grid(moved_to, (6, 4, 6), image)
    # A label that starts one voxel later than the image and ends with it.
    label_affine = moved_to.copy()
    label_affine[0, 3] += 2
    labels = torch.randint(1, 9, (1, 5, 4, 6), dtype=torch.uint8)
    pred = torch.zeros(5, 6, 4, 6, dtype=torch.float16)
    pred[0], pred[2] = 2, 1
    item = {"pred": pred, "moving_raw": moving, "fixed": fixed, "label": on_grid(label_affine, (5, 4, 6), labels)}
    out = RestorePredd(label_key="label")(item)
    assert out["moved"].dtype == torch.float32 and out["moved_label"].dtype == torch.uint8
    torch.testing.assert_close(out["moved"].as_tensor(), image[:, 2:5, :, 1:6].float(), atol=1e-3, rtol=0)
    assert torch.equal(out["moved_label"].as_tensor(), labels[:, 1:4, :, 1:6])
    assert out["ddf"].dtype == torch.float32 and torch.equal(out["moved_label"].affine, fixed.affine)
    assert out["ddf"].flatten(1).unique(dim=1).flatten().tolist() == [5.0, 0.0, 0.0]
    assert "moved_label" not in RestorePredd()(item) and set(item) == {"pred", "moving_raw", "fixed", "label"}
    names = RestorePredd("pred", "moving_raw", "fixed", "u", "m", "label", "l")(item)
    assert {"u", "m", "l"} < set(names) and "ddf" not in names


def test_restore_pred_takes_zero_from_outside_the_moving_image() -> None:
    image = on_grid(np.eye(4), (5, 5), torch.ones(1, 5, 5))
    pred = torch.zeros(3, 5, 5)
    pred[0] = 3
    moved = RestorePredd()({"pred": pred, "moving_raw": image, "fixed": image})["moved"]
    assert moved[0, :2].unique().tolist() == [1.0] and moved[0, 2:].unique().tolist() == [0.0]


def test_restore_pred_says_what_it_expects() -> None:
    image, pred = on_grid(np.eye(4), (4, 5, 6)), torch.zeros(4, 4, 5, 6)
    with pytest.raises(ValueError, match="at least the shape of data\\['fixed'\\], \\[4, 5, 6\\], got \\[4, 5, 5\\]"):
        RestorePredd()({"pred": pred[..., :5], "moving_raw": image, "fixed": image})
    with pytest.raises(ValueError, match="same direction and spacing"):
        other = on_grid(np.diag([1.0, 1.0, 2.0, 1.0]), (4, 5, 6))
        RestorePredd()({"pred": pred, "moving_raw": other, "fixed": image})
    with pytest.raises(ValueError, match="RestorePredd expects data\\['moving_raw'\\] to be a MetaTensor"):
        RestorePredd()({"pred": pred, "moving_raw": image.as_tensor(), "fixed": image})


@pytest.mark.parametrize("dims", [2, 3])
def test_images_labels_and_points_go_through_fields_as_in_the_world(dims: int) -> None:
    shape = (9, 8, 7)[:dims]
    moving = helpers_grids.image(shape, helpers_grids.grid(dims, 1), 1)
    moving.meta["filename_or_obj"] = "scans/moving.nii.gz"
    fixed = MetaTensor(torch.zeros(1, 4, *shape[1:]), meta={"filename_or_obj": "fixed.nii"})
    field = helpers_grids.field(shape, moving.affine.numpy(), 2, strength=0.3)
    label = MetaTensor((moving > 100).to(torch.int16).as_tensor(), affine=moving.affine)
    points = torch.rand(6, dims) * 5
    item = {"moving": moving, "fixed": fixed, "label": label, "fixed_to_moving": field, "fixed_points": points}
    pipeline = Compose(
        [
            WarpImaged(("moving", "label"), output=("moved", "l"), mode=("linear", "nearest"), name_keys=IMAGE_KEYS),
            WarpPointsd(),
            InvertFieldd(),
        ]
    )
    out = pipeline(item)
    assert torch.equal(out["moved"], world.warp_image(moving, field)) and out["moved"].shape[1:] == shape
    assert torch.equal(out["l"], world.warp_image(label, field, "nearest")) and out["l"].dtype == torch.int16
    assert out["moved"].meta["filename_or_obj"] == "moving_to_fixed.nii.gz"
    assert torch.equal(out["mapped_points"], world.map_points(points, [field]))
    assert torch.equal(out["moving_to_fixed"], world.invert_field(field, moving.affine, shape))
    assert set(item) == {"moving", "fixed", "label", "fixed_to_moving", "fixed_points"}
    assert WarpImaged(allow_missing_keys=True)({"fixed_to_moving": field}).keys() == {"fixed_to_moving"}
    whole = WarpImaged()({**item, "moving": (10 * label).to(torch.int32)})["moved"]
    assert whole.dtype == torch.float32  # blended integers are no integers
    for transform in (WarpImaged, WarpPointsd):
        with pytest.raises(ValueError, match=f"{transform.__name__} expects one output name per key"):
            transform(("a", "b"), output="c")


def test_transforms_are_built_by_configs() -> None:
    config = {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "equireg.transforms.NormalizeContentd", "keys": ["moving", "fixed"]},
            {
                "_target_": "equireg.augmentation.RandShiftd",
                "keys": [["moving", "moving_label"], ["fixed", "fixed_label"]],
                "max_shift": 2,
                "prob": 0.5,
                "allow_missing_keys": True,
            },
            {"_target_": "equireg.transforms.StackPaird"},
        ],
    }
    parser = ConfigParser({"preprocessing": config})
    item = parser.get_parsed_content("preprocessing")({"moving": content_image(), "fixed": content_image(1)})
    assert item["image"].shape == (2, 7, 9) and item["image"].dtype == torch.float32
