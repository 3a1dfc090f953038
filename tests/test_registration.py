"""Registering a pair from end to end: what comes out is what ITK makes of it, on oblique grids that differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers_bundle import random_network
from helpers_grids import centered, grid, image, lps
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

import equireg
from equireg.batch import Outcome, register_pair
from equireg.images import read_image, write_image
from equireg.landmarks import Landmarks
from equireg.registration import Registrar, register
from equireg.results import save_registration
from equireg.world import field_affine, index_displacement, map_points, sample_transform

SHAPES = {2: ((26, 31), (29, 22)), 3: ((17, 23, 14), (21, 15, 19))}
SPACINGS = {2: ((1.3, 0.9), (0.8, 1.6)), 3: ((1.0, 0.8, 2.2), (1.4, 1.1, 0.9))}


def files(folder: Path, dims: int, seed: int = 0) -> tuple[Path, Path]:
    """Write a pair of files on unrelated oblique grids around one place, smooth images without background."""
    paths = []
    for n, name in enumerate(("moving", "fixed")):
        affine = centered(grid(dims, seed + n, SPACINGS[dims][n]), SHAPES[dims][n], [12.0 * n - 30] * dims)
        paths.append(write_image(image(SHAPES[dims][n], affine, seed + n), folder / f"{name}.nii.gz"))
    return paths[0], paths[1]


def anatomy(shape: tuple[int, ...] = (40, 52, 38)) -> np.ndarray:
    """Return a made-up organ in which every place looks its own way, background 0: an ellipsoid of cells."""
    random = np.random.default_rng(4)
    index = np.indices(shape).astype(float)
    middle = np.reshape(np.array(shape) / 2 - 0.5, (3, 1, 1, 1))
    organ = (((index - middle) / np.reshape([15, 20, 14], (3, 1, 1, 1))) ** 2).sum(axis=0) < 1
    seeds = random.uniform(0, 1, (60, 3)) * shape
    nearest = ((index[..., None] - seeds.T[:, None, None, None, :]) ** 2).sum(axis=0).argmin(axis=-1)
    values = gaussian_filter(random.uniform(40, 220, 60)[nearest], 0.7)
    return np.where(organ, values, 0).astype(np.float32)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("spacing", [None, 1.5])
@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("dims", [2, 3])
def test_itk_makes_the_same_moved_image_of_the_files(
    dims: int, seed: int, spacing: float | None, tmp_path: Path
) -> None:
    moving, fixed = files(tmp_path, dims, seed)
    before = hashes(tmp_path)
    result = register(moving, fixed, weights=random_network(dims).net, spacing=spacing)
    out = save_registration(result, tmp_path / "out", exports=["h5"])
    assert hashes(tmp_path) == before
    source, target = (sitk.ReadImage(str(path), sitk.sitkFloat64) for path in (moving, fixed))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out["moved"]), sitk.sitkFloat64)).T
    vectors = sitk.ReadImage(str(out["fixed_to_moving"]), sitk.sitkVectorFloat64)
    at = index_displacement(result.fixed_to_moving, result.pair["moving"]).numpy() + np.indices(target.GetSize())
    inside = ((at >= 1) & (at <= np.reshape(source.GetSize(), [-1] + [1] * dims) - 2)).all(axis=0)
    assert inside.sum() > 50
    transforms = {
        "field": sitk.DisplacementFieldTransform(vectors),
        "composite": sitk.ReadTransform(str(out["fixed_to_moving_h5"])),
    }
    span = float(result.pair["moving"].max() - result.pair["moving"].min())
    for name, transform in transforms.items():
        theirs = sitk.GetArrayFromImage(sitk.Resample(source, target, transform, sitk.sitkLinear, 0.0)).T
        assert np.abs(ours - theirs)[inside].max() < 1e-3 * span, name
    outside = ((at <= -1) | (at >= np.reshape(source.GetSize(), [-1] + [1] * dims))).any(axis=0)
    assert np.all(ours[outside] == 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_points_follow_the_transform_named_for_them(dims: int, tmp_path: Path) -> None:
    moving, fixed = files(tmp_path, dims)
    network = random_network(dims).net
    grids = [read_image(path) for path in (moving, fixed)]
    middle = [
        (field_affine(one) @ torch.tensor([*((n - 1) / 2 for n in one.shape[1:]), 1.0], dtype=torch.float64))[:dims]
        for one in grids
    ]
    offsets = torch.rand(5, dims, dtype=torch.float64) * 2 - 1
    points = [Landmarks(center + offsets, tuple("abcde")) for center in middle]
    result = register(moving, fixed, weights=network, moving_points=points[0], fixed_points=points[1])
    assert torch.equal(result.moved_points.points_mm, map_points(points[0].points_mm, [result.moving_to_fixed]))
    there = map_points(points[1].points_mm, [result.fixed_to_moving])
    assert torch.equal(result.fixed_points_in_moving.points_mm, there)
    assert result.moved_points.names == tuple("abcde")
    expected = (there - points[0].points_mm).norm(dim=1).mean().item()
    assert result.report["landmarks"]["tre_mm"] == pytest.approx(expected)


def test_an_initial_affine_starts_and_ends_in_the_answer() -> None:
    """Turned by a right angle, an organ is out of the network's reach, unless it is told."""
    values = torch.from_numpy(anatomy())[None]
    fixed = MetaTensor(values, affine=torch.eye(4))
    turn = torch.tensor(
        [[0.0, -1.0, 0.0, 70.0], [1.0, 0.0, 0.0, -5.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]]
    ).double()
    moving = MetaTensor(values, affine=turn)  # the point at index x lies at turn(x)
    registrar = Registrar("hippocampus")
    told = registrar(moving, fixed, initial_transform=turn)
    alone = registrar(fixed, fixed)
    points = torch.rand(20, 3, dtype=torch.float64) * 20 + 10
    expected = map_points(points, [alone.fixed_to_moving, turn])
    assert (map_points(points, [told.fixed_to_moving]) - expected).abs().max() < 1e-3
    assert (map_points(map_points(points, [told.fixed_to_moving]), [told.moving_to_fixed]) - points).norm(
        dim=1
    ).max() < 0.3


@pytest.mark.parametrize("angle", [30.0, pytest.param(90.0, marks=pytest.mark.slow), 180.0])
def test_an_initial_affine_holds_beyond_what_the_network_sees(angle: float) -> None:
    """Content in the middle of a large empty canvas: around it, too, the field is the rotation, and nothing folds."""
    canvas = np.zeros((1, 60, 64, 40), dtype=np.float32)
    canvas[0, 24:38, 22:40, 13:27] = anatomy()[13:27, 17:35, 12:26]
    t, middle = np.deg2rad(angle), np.array([29.5, 31.5, 19.5])
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    turn[:3, 3] = torch.from_numpy(middle) - turn[:3, :3] @ torch.from_numpy(middle)
    fixed = MetaTensor(torch.from_numpy(canvas), affine=torch.eye(4))
    moving = MetaTensor(torch.from_numpy(canvas), affine=turn)
    told = register(moving, fixed, initial_transform=turn)
    alone = register(fixed, fixed)
    expected = sample_transform([alone.fixed_to_moving, turn], torch.eye(4), canvas.shape[1:])
    assert (told.fixed_to_moving - expected).abs().max() < 1e-3
    assert told.report["folding_percent"] == alone.report["folding_percent"]
    assert told.report["inverse_consistency_mm"] < 0.2
    assert torch.equal(told.moved[:, :15] != 0, alone.moved[:, :15] != 0)  # no smear far from the content


def test_what_is_no_argument_is_refused() -> None:
    scan = image((20, 20), np.eye(4))
    with pytest.raises(ValueError, match="no argument 'optimise', did you mean optimize"):
        register(scan, scan, optimise=50)
    with pytest.raises(ValueError, match="no part 'moving_labels', did you mean 'moving_label'"):
        Registrar("vessels")(scan, scan, moving_labels=scan)


def test_a_given_network_stays_as_it_is() -> None:
    network = random_network(2).net.train()
    register(image((20, 20), np.eye(4)), image((20, 20), np.eye(4), 1), weights=network)
    assert network.training


def test_pairs_do_not_see_each_other() -> None:
    network = random_network(2).net
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pairs = [[image((24, 20), np.eye(4), seed), image((22, 26), np.eye(4), seed + 1)] for seed in (0, 5)]
    for method in ("field", "network"):
        registrar = Registrar(network, optimize=2, method=method)
        first, second = (registrar(*pair) for pair in pairs)
        alone = Registrar(network, optimize=2, method=method)(*pairs[1])
        assert torch.equal(second.fixed_to_moving, alone.fixed_to_moving)
        assert not torch.equal(first.fixed_to_moving, second.fixed_to_moving)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_sources_in_memory_are_as_good_as_files(tmp_path: Path) -> None:
    moving, fixed = files(tmp_path, 2)
    network = random_network(2).net
    from_files = register(moving, fixed, weights=network)
    loaded = [nib.load(path) for path in (moving, fixed)]
    arrays = [(one.get_fdata(dtype=np.float32), one.affine) for one in loaded]
    kept = [array.copy() for array, _ in arrays]
    for sources in ([read_image(moving), read_image(fixed)], loaded, arrays):
        assert torch.equal(register(*sources, weights=network).fixed_to_moving, from_files.fixed_to_moving)
    assert all(np.array_equal(array, copy) for (array, _), copy in zip(arrays, kept))


def test_backgrounds_and_masks_decide_what_is_seen() -> None:
    scan = image((30, 26), np.eye(4), 1) - 1100  # as in CT: tissue near -1000 .. and air below it
    scan[0, :6], scan[0, 24:] = -2000.0, -2000.0
    network = random_network(2).net
    plain = register(scan, scan, weights=network)
    assert any("if -2000 is its background" in warning for warning in plain.report["warnings"])
    told = register(scan, scan, weights=network, background=-2000.0)
    assert told.report["network"]["moving"]["shape"] == [18, 26]
    assert not any("background" in warning for warning in told.report["warnings"])
    mask = MetaTensor((scan > -2000).as_tensor().to(torch.uint8), affine=scan.affine)
    masked = register(scan, scan, weights=network, moving_mask=mask, fixed_mask=mask)
    assert masked.report["network"] == told.report["network"]
    far = register(
        scan,
        scan,
        weights=network,
        background=-2000.0,
        initial_transform=torch.tensor([[1.0, 0.0, 500.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64),
    )
    assert (far.fixed_to_moving[0].mean() - told.fixed_to_moving[0].mean()).abs() < 600  # still found its own way


def test_the_report_is_json_and_says_what_was_done(tmp_path: Path) -> None:
    moving, fixed = files(tmp_path, 3)
    label = MetaTensor((read_image(moving) > 100).to(torch.uint8).as_tensor(), affine=read_image(moving).affine)
    write_image(label, tmp_path / "label.nii.gz")
    result = register(moving, fixed, weights=random_network(3).net, spacing=2.0, moving_label=tmp_path / "label.nii.gz")
    out = save_registration(result, tmp_path / "out", exports=["affine", "learn2reg"])
    report = json.loads(out["report"].read_text())
    assert report["inputs"]["moving"] == str(moving) and report["network"]["fixed"]["spacing_mm"] == [2.0, 2.0, 2.0]
    for key in ("similarity", "folding_percent", "sd_log_jacobian", "inverse_consistency_mm", "seconds", "software"):
        assert report[key] is not None
    assert report["options"]["weights"] == "CARL" and report["seconds"]["total"] > 0
    assert set(report["files"].values()) == {path.name for path in (tmp_path / "out").iterdir()}
    labels = nib.load(out["moved_label"])
    assert labels.get_data_dtype().kind in "iu" and labels.shape == SHAPES[3][1]
    affine = sitk.ReadTransform(str(out["affine"]))
    point = np.array([3.0, -8.0, 11.0])
    ours = np.array(report["best_affine"])[:3] @ [*point, 1.0]
    assert np.abs(np.array(affine.TransformPoint((point * lps(3)).tolist())) * lps(3) - ours).max() < 1e-6


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving, fixed = files(tmp_path, 2)
    result = register(moving, fixed, weights=random_network(2).net)
    save_registration(result, tmp_path / "out", picture=False)
    before = hashes(tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(equireg.results, "write_displacement_field", full)
    with pytest.raises(OSError, match="No space left"):
        save_registration(result, tmp_path / "out", picture=False)
    assert hashes(tmp_path / "out") == before and len(list((tmp_path / "out").iterdir())) == len(before)
    monkeypatch.undo()
    for bad, message in (("nothing", "exports are any of"), (["h5", "h6"], "exports are any of")):
        with pytest.raises(ValueError, match=message):
            save_registration(result, tmp_path / "out", exports=bad)
    (tmp_path / "in").mkdir()
    moved = Path(moving).rename(tmp_path / "in" / "moved.nii.gz")
    again = register(moved, fixed, weights=random_network(2).net)
    with pytest.raises(ValueError, match="would take the place of an input"):
        save_registration(again, tmp_path / "in")


def test_the_report_of_a_pair_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that another process takes away or damages in between cannot stop the list."""
    moving, fixed = files(tmp_path, 2)
    registrar, pair = Registrar(random_network(2).net), {"moving": moving, "fixed": fixed}
    first = register_pair(registrar, pair, tmp_path / "out", picture=False)
    assert first.status == "registered"
    report, read, read_text = tmp_path / "out" / "report.json", [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *words: read.append(path) or read_text(path, *words))
    again = register_pair(registrar, pair, tmp_path / "out", picture=False)
    assert again == Outcome(first.name, "done before", first.message) and read.count(report) == 1
    for damage in ({"warnings": None}, {"warnings": [1]}, {"files": {"moved": "gone.nii.gz"}}):
        report.write_text(json.dumps({**json.loads(report.read_text()), **damage}))
        assert register_pair(registrar, pair, tmp_path / "out", picture=False).status == "registered"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "both"}, "field or network"),
        ({"similarity": "ssd"}, "lncc or mind"),
        ({"optimize": -1}, "0 or more"),
        ({"optimize": 2.5}, "0 or more"),
        ({"device": "warp9"}, "cannot be used here"),
        ({"device": ["cpu"]}, "cannot be used here"),
        ({"device": None}, "cannot be used here"),
        ({"spacing": (1.0, 2.0, 3.0)}, "2 positive numbers"),
        ({"spacing": ["a", "b"]}, "2 positive numbers"),
        ({"spacing": [[1.0], [2.0]]}, "2 positive numbers"),
        ({"spacing": {"x": 1.0}}, "2 positive numbers"),
        ({"spacing": 10**400}, "2 positive numbers"),
        ({"spacing": 1e30}, "nothing is left of .* should be smaller"),
        ({"moving_label": image((4, 4), np.eye(4)).round().int()}, "grid"),
        ({"moving_points": Landmarks(torch.full((1, 2), 1e4))}, "outside the image"),
        ({"similarity_mask": MetaTensor(torch.zeros(1, 29, 22, dtype=torch.uint8))}, "grid|empty"),
        ({"initial_transform": torch.eye(4)}, "2D points"),
        ({"initial_transform": np.diag([1.0, 1.0, 2.0])}, "last row"),
        ({"initial_transform": np.diag([1.0, 0.0, 1.0])}, "have an inverse"),
        ({"moving_points": np.full((1, 2), 1e4)}, "outside the image"),
        ({"background": float("nan")}, "is a number"),
        ({"background": None}, "is a number"),
        ({"fixed_background": 10**400}, "is a number"),
        ({"weights": 7}, "a name, a file or a network"),
        ({"fixed": image((9, 9, 9), np.eye(4))}, "2D|two"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(options: dict, message: str, tmp_path: Path) -> None:
    moving, fixed = files(tmp_path, 2)
    arguments = {"weights": random_network(2).net, "moving": moving, "fixed": fixed, **options}
    with pytest.raises(ValueError, match=message):
        register(**arguments)
    with pytest.raises(FileNotFoundError, match="no weights 'hippo'"):
        Registrar("hippo")
