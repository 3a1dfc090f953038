from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from equireg.fields import identity_grid, warp
from equireg.metrics import folding_fraction
from equireg.pictures import registration_figure, save_figure


def ball(shape, center, radius=4.0):
    at = torch.tensor(center, dtype=torch.float32).reshape(-1, *[1] * len(shape))
    return ((identity_grid(list(shape))[0] - at).norm(dim=0, keepdim=True) <= radius).float()


def pixels(axes):
    """Return the picture of a panel, array axis 0 first."""
    return np.swapaxes(np.asarray(axes.get_images()[0].get_array()), 0, 1)


def marks(axes):
    """Return the centers of the cells marked as folded."""
    found = [c for c in axes.collections if c.get_gid() == "folds"]
    return np.concatenate([np.asarray(c.get_offsets()) for c in found]) if found else np.zeros((0, 2))


def folded_field(shape, at):
    """A smooth shift with a single voxel pushed over its neighbor."""
    ddf = torch.full((len(shape), *shape), 0.25)
    ddf[(0, *at)] += 1.5
    return ddf


def test_a_shift_is_seen_before_and_gone_after():
    moving, fixed = ball((40, 30), (9, 20)), ball((36, 33), (26, 8))
    ddf = torch.tensor([-17.0, 12.0]).reshape(2, 1, 1).expand(2, 36, 33)
    moved = warp(moving[None], ddf[None], padding="zeros")[0]
    figure = registration_figure(moving, fixed, moved, ddf)
    before, after = pixels(figure.axes[2]), pixels(figure.axes[3])
    assert before.shape == (40, 33, 3) and after.shape == (36, 33, 3)
    assert before[9, 20].tolist() == [1, 0, 1] and before[26, 8].tolist() == [0, 1, 0]
    assert np.abs(after[..., 0] - after[..., 1]).max() < 1e-5 and after[26, 8].min() > 1 - 1e-5
    assert figure.axes[4].get_title() == "deformed grid, folding 0.00 %\nmean shift (-17.0, 12.0) removed"
    assert len(marks(figure.axes[4])) == 0
    assert "gray to white" in figure.texts[0].get_text()


def test_panels_show_the_content_and_its_margin():
    moving, fixed = ball((40, 30), (9, 20)), ball((36, 33), (26, 8))
    figure = registration_figure(moving, fixed, fixed, torch.zeros(2, 36, 33))
    assert figure.axes[1].get_xlim() == (19.5, 32.5) and figure.axes[1].get_ylim() == (1.5, 14.5)
    assert figure.axes[2].get_xlim() == (2.5, 32.5) and figure.axes[2].get_ylim() == (1.5, 26.5)


def test_the_grid_of_a_constant_ddf_is_straight():
    image = ball((30, 30), (15, 15), 12)
    figure = registration_figure(image, image, image, torch.full((2, 30, 30), 100.3))
    vertical, horizontal = figure.axes[4].collections
    for lines, axis in ((vertical, 0), (horizontal, 1)):
        assert len(lines.get_paths()) > 5
        for path in lines.get_paths():
            assert np.ptp(path.vertices[:, axis]) < 1e-4
            assert abs(path.vertices[0, axis] - round(path.vertices[0, axis])) < 1e-4


def test_the_grid_follows_the_moved_image():
    """A line of the grid is where `x + ddf(x)` has a whole multiple of the step, here a sheared line."""
    image = ball((41, 41), (20, 20), 18)
    ddf = torch.zeros(2, 41, 41)
    ddf[0] = 0.25 * (identity_grid([41, 41])[0, 1] - 20)
    figure = registration_figure(image, image, image, ddf)
    for path in figure.axes[4].collections[0].get_paths():
        x, y = path.vertices.T
        assert np.abs(x + 0.25 * (y - 20) - x[0] - 0.25 * (y[0] - 20)).max() < 1e-4
        assert np.ptp(y) > 1


def test_folded_cells_are_marked_and_counted_2d():
    image = ball((21, 17), (10, 8), 5)
    ddf = folded_field((21, 17), (10, 8))
    figure = registration_figure(image, image, image, ddf)
    expected = 100 * folding_fraction(ddf[None]).item()
    assert expected > 0
    assert f"folding {expected:.2f} %" in figure.axes[4].get_title()
    found = marks(figure.axes[4])
    assert len(found) == round(expected / 100 * 20 * 16)
    assert np.abs(found - np.array([10.5, 8])).max() <= 0.5
    color = next(c for c in figure.axes[4].collections if c.get_gid() == "folds").get_facecolor()[0]
    assert color[0] > 0.9 and color[1] < 0.3 and color[2] < 0.3


def test_folded_cells_are_marked_beside_the_slice_only_3d():
    image = ball((13, 15, 11), (6, 7, 5), 4)
    for layer, seen in ((5, True), (8, False)):
        ddf = folded_field((13, 15, 11), (6, 7, layer))
        figure = registration_figure(image, image, image, ddf)
        assert (len(marks(figure.axes[4])) > 0) == seen
        assert f"folding {100 * folding_fraction(ddf[None]).item():.2f} %" in figure.axes[4].get_title()


@pytest.mark.parametrize(
    ("cells", "text"), [(1, "<0.01 %"), (99_999, ">99.99 %"), (100_000, "100.00 %"), (50_000, "50.00 %"), (0, "0.00 %")]
)
def test_the_percentage_is_never_rounded_to_none_or_all(cells, text):
    from equireg.pictures import _percent

    assert _percent(torch.arange(100_000) < cells) == text


def test_3d_slices_pass_through_the_content():
    """The axis with the fewest voxels is cut, each image through the center of its own content if grids differ."""
    moving, fixed = ball((31, 9, 27), (9, 2, 20), 2), ball((25, 11, 29), (13, 7, 9), 2)
    figure = registration_figure(moving, fixed, fixed, torch.zeros(3, 25, 11, 29), spacing=(1, 1, 2))
    assert figure.axes[0].get_title() == "moving\n31 x 9 x 27, axis 1 at 2"
    assert figure.axes[1].get_title() == "fixed\n25 x 11 x 29, axis 1 at 7"
    assert pixels(figure.axes[0])[9, 20] == 1 and pixels(figure.axes[1])[13, 9] == 1
    assert all(axes.get_aspect() == 2 for axes in figure.axes)


def test_one_grid_is_cut_once_unless_the_slice_misses_the_moving_content():
    fixed = ball((20, 20, 18), (9, 9, 5), 2)
    for center, index in ((6, 5), (13, 13)):
        moving = ball((20, 20, 18), (9, 9, center), 2)
        figure = registration_figure(moving, fixed, fixed, torch.zeros(3, 20, 20, 18))
        assert figure.axes[0].get_title().endswith(f"axis 2 at {index}")


@pytest.mark.parametrize("shape", [(5, 17), (33, 7), (1, 9), (3, 5, 7), (8, 8, 1)])
@pytest.mark.parametrize("empty", [False, True])
def test_odd_shapes_and_empty_images_are_drawn(tmp_path, shape, empty):
    image = torch.zeros(2, *shape) if empty else torch.rand(2, *shape)
    ddf = 3 * torch.randn(len(shape), *shape)
    figure = registration_figure(image, image, image, ddf)
    assert save_figure(figure, tmp_path / "picture.png").stat().st_size > 1000


def test_the_rest_of_the_types_and_values():
    """Half precision, gradients, integers and negative values are drawn; nothing given is changed."""
    image = torch.randint(-1000, 1000, (1, 12, 10), dtype=torch.int16)
    ddf = torch.randn(2, 12, 10, dtype=torch.float16, requires_grad=True)
    copies = image.clone(), ddf.detach().clone()
    figure = registration_figure(image, image, image, ddf)
    assert 0 <= pixels(figure.axes[0]).min() and pixels(figure.axes[0]).max() <= 1
    assert torch.equal(image, copies[0]) and torch.equal(ddf.detach(), copies[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ddf": torch.zeros(3, 8, 9)}, "grid of a ddf"),
        ({"ddf": torch.zeros(2, 8, 8)}, "grid of a ddf"),
        ({"moved": torch.zeros(1, 9, 8)}, "grid of a ddf"),
        ({"moving": torch.zeros(1, 1, 8, 9)}, "grid of a ddf"),
        ({"moving": torch.zeros(1, 0, 9)}, "grid of a ddf"),
        ({"ddf": torch.full((2, 8, 9), torch.nan)}, "infinity in ddf"),
        ({"fixed": torch.full((1, 8, 9), torch.inf)}, "infinity in fixed"),
        ({"spacing": (1.0,)}, "2 positive spacings"),
        ({"spacing": (1.0, 0.0)}, "2 positive spacings"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    images = {name: torch.zeros(1, 8, 9) for name in ("moving", "fixed", "moved")}
    with pytest.raises(ValueError, match=message):
        registration_figure(**{**images, "ddf": torch.zeros(2, 8, 9), **change})


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    image = torch.rand(1, 8, 8)
    figure = registration_figure(image, image, image, torch.zeros(2, 8, 8))
    path = tmp_path / "picture.png"
    path.write_text("old")

    def fail(file, **kwargs):
        assert Path(file) != path
        Path(file).write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(figure, "savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            save_figure(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert save_figure(figure, path) == path
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["picture", "picture.xyz", "nowhere/picture.png"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, name):
    image = torch.rand(1, 8, 8)
    figure = registration_figure(image, image, image, torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="folder that exists, ending in one of"):
        save_figure(figure, tmp_path / name)


def test_no_pyplot_and_no_matplotlib_before_the_first_picture():
    code = """
import sys, torch, equireg.pictures as pictures
assert "matplotlib" not in sys.modules
image = torch.rand(1, 8, 8)
pictures.registration_figure(image, image, image, torch.zeros(2, 8, 8))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    image = torch.rand(1, 8, 8)
    with pytest.raises(ImportError, match="need matplotlib"):
        registration_figure(image, image, image, torch.zeros(2, 8, 8))
