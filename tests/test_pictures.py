"""Pictures of registrations: what lies where in their panels, against shifts, turns and folds made by hand."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

pytest.importorskip("matplotlib")

from equireg._panels import draw_folds, empty_figure, percent
from equireg._quality import _raster
from equireg._views import GrayImage, content_box, fold_share, rigid_part, square_affine, views
from equireg.fields import identity_grid, warp
from equireg.metrics import folding_fraction
from equireg.pictures import quality_figure, registration_figure, save_figure


def ball(shape, center, radius=4.0):
    at = torch.tensor(center, dtype=torch.float32).reshape(-1, *[1] * len(shape))
    return ((identity_grid(list(shape))[0] - at).norm(dim=0, keepdim=True) <= radius).float()


def pixels(axes):
    """Return the picture of a panel, array axis 0 first."""
    return np.swapaxes(np.asarray(axes.get_images()[0].get_array()), 0, 1)


def marks(axes):
    """Return the centers of the cells marked as folded, in the unit of the panel."""
    found = [image for image in axes.get_images() if image.get_gid() == "folds"]
    if not found:
        return np.zeros((0, 2))
    red = np.swapaxes(np.asarray(found[0].get_array())[..., 3] > 0, 0, 1)
    left, right, low, high = found[0].get_extent()
    size = np.array([right - left, high - low]) / red.shape
    return np.array([left, low]) + (np.argwhere(red) + 0.5) * size


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
    colors = np.asarray(figure.axes[4].get_images()[-1].get_array()).reshape(-1, 4)
    color = colors[colors[:, 3] > 0][0]
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
    assert percent(cells / 100_000) == text


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


# From here on: quality_figure, which knows millimeters.


def oblique(dims, spacing, seed=0):
    """Return the affine of a turned grid."""
    generator = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:dims, :dims] = np.linalg.qr(generator.standard_normal((dims, dims)))[0] * spacing
    affine[:dims, 3] = generator.uniform(-50, 50, dims)
    return affine


def on(affine, values):
    return MetaTensor(torch.as_tensor(values), affine=torch.as_tensor(affine))


def still(image):
    """Return the displacement field of the identity on the grid of an image."""
    return on(image.affine, torch.zeros(image.dim() - 1, *image.shape[1:]))


def notes(panel):
    return [text.get_text() for text in panel.texts]


def letters(panel):
    """Return the letters at the left, right, bottom and top of a panel."""
    at = {tuple(text.xy): text.get_text() for text in panel.texts if len(text.get_text()) == 1}
    return "".join(at[place] for place in ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1)))


def look(panel, right, up):
    """Return the color or brightness of a panel at a position in its unit."""
    image = panel.get_images()[0]
    left, end, low, high = image.get_extent()
    values = pixels(panel)
    column = int((right - left) / (end - left) * values.shape[0])
    return values[column, int((up - low) / (high - low) * values.shape[1])]


def rows_of(figure):
    return [figure.axes[start : start + 4] for start in range(0, len(figure.axes), 4)]


@pytest.mark.parametrize(
    ("shape", "planes"),
    [
        ((20, 24, 18), ["axial", "coronal", "sagittal"]),
        ((20, 24, 1), ["axial"]),
        ((1, 24, 18), ["sagittal"]),
        ((1, 9, 1), ["axial"]),
        ((1, 1, 1), ["axial"]),
        ((20, 24), [""]),
        ((1, 7), [""]),
    ],
)
def test_quality_has_a_row_for_each_plane_and_four_columns(tmp_path, shape, planes):
    image = on(np.eye(4), torch.rand(1, *shape) + 0.1)
    lines = ["similarity 0.41 -> 0.83", "two $ and a _"]
    figure = quality_figure(image, image, image, still(image), title="a $x to b", lines=lines)
    assert len(figure.axes) == 4 * len(planes)
    titles = [panel.get_title().split("\n")[0] for panel in figure.axes]
    assert titles[:4] == ["before", "after", "checkerboard", "deformed grid, folding 0.00 %"]
    assert not any(titles[4:])
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text in ("axial", "coronal", "sagittal", "")] == planes
    assert texts[:3] == ["a $x to b", *lines] and "gray to white where they agree" in texts[3]
    assert figure.get_figwidth() * 150 <= 2400
    assert save_figure(figure, tmp_path / "qc.png").stat().st_size > 1000


def test_every_panel_is_filled_by_its_window_in_true_proportions():
    image = on(np.diag([0.5, 2, 3, 1]), ball((40, 30, 8), (20, 15, 4), 9))
    for panel in quality_figure(image, image, image, still(image)).axes:
        box = panel.get_position().transformed(panel.figure.dpi_scale_trans.inverted().inverted())
        width, height = panel.figure.get_size_inches()
        shape = panel.get_position().height * height / (panel.get_position().width * width)
        assert box.width > 0 and 0.44 < shape < 1.01
        assert np.ptp(panel.get_ylim()) / np.ptp(panel.get_xlim()) == pytest.approx(shape, rel=1e-9)


def stored(image, order, signs):
    """Return an image with its axes in another order and direction, in the same place of the world."""
    change = np.array([[order.index(axis), signs[order.index(axis)]] for axis in range(3)])
    values = np.stack([nib.apply_orientation(channel, change) for channel in np.asarray(image)])
    return on(image.affine.numpy() @ nib.orientations.inv_ornt_aff(change, image.shape[1:]), values.copy())


ORDERS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


@pytest.mark.parametrize("order, signs", ORDERS[3::16])
def test_the_picture_does_not_depend_on_how_the_fixed_image_is_stored(order, signs):
    """Flipped and permuted grids: same letters, same pixels, up to the place of planes between two voxels."""
    generator = np.random.default_rng(1)
    image = on(np.diag([1.0, 2.0, 3.0, 1.0]), generator.uniform(0.2, 1, (1, 11, 15, 7)).astype(np.float32))
    moving = on(oblique(3, (1.3, 0.9, 2.1)), generator.uniform(0.2, 1, (1, 12, 13, 9)).astype(np.float32))
    moved = on(image.affine, generator.uniform(0.2, 1, (1, 11, 15, 7)).astype(np.float32))
    first = quality_figure(moving, image, moved, still(image))
    fixed = stored(image, order, signs)
    second = quality_figure(moving, fixed, stored(moved, order, signs), still(fixed))
    for one, other in zip(rows_of(first), rows_of(second)):
        assert letters(one[0]) == letters(other[0]) == letters(other[1])
        for a, b in zip(one, other):
            assert pixels(a).shape == pixels(b).shape
            np.testing.assert_allclose(pixels(a), pixels(b), atol=1e-4)


def test_letters_say_where_things_are():
    """A mark on the right, anterior, superior side, on a grid stored as PIL, appears at the letters R, A and S."""
    values = torch.full((1, 30, 26, 22), 0.3)
    values[0, 6, 19, 5] = 1.0  # posterior to anterior is axis 0 reversed, inferior is axis 1 reversed, left axis 2
    affine = np.array([[0.0, 0, -1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    image = on(affine, values)
    for view, expected in zip(views(affine, values.shape[1:], content_box(values[0] > 0)), ("LRPA", "LRIS", "PAIS")):
        assert view.letters == expected
        right, up = view.on_plane(np.array([[6.0], [19.0], [5.0]]))[:, 0]
        sides = {"axial": (True, True), "coronal": (True, False), "sagittal": (True, False)}[view.name]
        middle = [step * (view.shape[axis] - 1) / 2 for axis, step in zip(view.axes, view.step)]
        assert (right > middle[0], up > middle[1]) == sides
        plane = values[0].select(view.through, {0: 6, 1: 19, 2: 5}[view.through])
        assert view.turn(plane)[int(right), int(up)] == 1
    assert [letters(row[0]) for row in rows_of(quality_figure(image, image, image, still(image)))] == [
        "LRPA",
        "LRIS",
        "PAIS",
    ]


def test_photographs_appear_as_they_are_stored():
    """Readers give a photograph the affine diag(-1, -1): x to the right and y down, no letters."""
    values = torch.full((1, 30, 20), 0.3)
    values[0, :15, :10] = 1.0  # the upper left quarter
    image = on(np.diag([-1.0, -1, 1, 1]), values)
    panel = quality_figure(image, image, image, still(image)).axes[2]
    assert look(panel, 3, 16) > 0.99 and max(look(panel, 3, 3), look(panel, 26, 16), look(panel, 26, 3)) < 0.2
    assert not [note for note in notes(panel) if len(note) == 1]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_shift_in_the_world_is_overlaid_exactly(dims):
    """The moving file holds the fixed voxels with another origin: the overlay is a copy, shifted by that."""
    shape, spacing = (40, 32, 24)[:dims], np.array([1.0, 1.5, 2.0])[:dims]
    values = np.random.default_rng(0).uniform(0.2, 1, (1, *shape)).astype(np.float32)
    fixed = on(oblique(dims, spacing), values)
    affine = fixed.affine.numpy().copy()
    shift = np.array([5.0, -3.0, 0.0])[:dims]  # fixed voxels
    affine[:dims, 3] += affine[:dims, :dims] @ shift
    figure = quality_figure(on(affine, values), fixed, fixed, still(fixed))
    box = np.array([[0] * dims, np.array(shape) - 1])
    view = next(v for v in views(square_affine(fixed.affine, dims), shape, box) if v.through in (None, 2))
    row = 0 if dims == 2 else [v.through for v in views(square_affine(fixed.affine, dims), shape, box)].index(2)
    panel = rows_of(figure)[row][0]
    checked = 0
    for index in np.ndindex(*shape[:2]):
        here = np.array([*index, view.index][:dims], dtype=float)
        color = look(panel, *view.on_plane(here[:, None])[:, 0])
        assert color[1] == pytest.approx(look(rows_of(figure)[row][1], *view.on_plane(here[:, None])[:, 0])[1])
        if 5 <= index[0] and index[1] < shape[1] - 3:  # the fixed voxel from which the moving value at `here` came
            origin = look(panel, *view.on_plane((here - shift)[:, None])[:, 0])
            assert color[0] == pytest.approx(origin[1], abs=1e-4)
            checked += 1
    assert checked > 800
    distance = np.linalg.norm(fixed.affine.numpy()[:dims, :dims] @ shift)
    assert f"centers of the contents {distance:.1f} mm apart" in figure.axes[0].get_title()


@pytest.mark.parametrize("dims", [2, 3])
def test_images_on_any_two_grids_are_sampled_at_the_same_place_of_the_world(dims):
    """Linear interpolation of a linear function of the world is exact, on oblique, mirrored, anisotropic grids."""
    slope = np.array([0.3, -0.2, 0.5])[:dims]
    images = []
    for seed, shape in enumerate(((24, 25, 26)[:dims], (31, 22, 27)[:dims])):
        affine = oblique(dims, np.array([0.9, -1.2, 1.7])[:dims], seed)
        middle = affine[:dims, :dims] @ ((np.array(shape) - 1) / 2)
        affine[:dims, 3] = 3 * seed - middle
        world = np.einsum("ij,j...->i...", affine[:dims, :dims], np.indices(shape))
        world += affine[:dims, 3].reshape(-1, *[1] * dims)
        images.append(on(affine, np.einsum("i,i...->...", slope, world)[None]))
    own, fixed_affine = (square_affine(image.affine, dims) for image in images)
    target = GrayImage.of(images[1], -1000.0, np.eye(dims + 1))
    source = GrayImage.of(images[0], -1000.0, np.linalg.solve(own, fixed_affine), like=target)
    for view in views(fixed_affine, images[1].shape[1:], target.box):
        right, up = (np.linspace(0, at[-1], 40) for at in view.positions())
        here, there = (image.at(view.points(right, up)) for image in (source, target))
        inside = here > 0
        assert inside.mean() > 0.3
        # Half a voxel beyond the outermost voxel centers, values are continued unchanged.
        close = np.abs(here - there)[inside] < 1e-5
        assert close.mean() > 0.8
        corners = source.corners().mean(axis=1)
        assert np.linalg.norm(source.from_fixed[:dims] @ [*corners, 1] - source.box.mean(axis=0)) < 1e-9


def test_images_far_apart_are_put_side_by_side_with_their_distance():
    fixed = on(np.eye(4), ball((30, 30, 30), (15, 15, 15), 10))
    moving = on(np.eye(4) + np.array([[0, 0, 0, 3000], [0, 0, 0, 0], [0, 0, 0, 40], [0, 0, 0, 0]]), fixed.as_tensor())
    field = still(fixed)
    field[0], field[2] = 3000, 40
    axial, coronal, sagittal = rows_of(quality_figure(moving, fixed, fixed, field))
    assert "side by side: 3000 mm apart in this plane\nmoving image cut 40.0 mm further S" in notes(axial[0])
    for panel in (axial[0], coronal[0]):
        colors = pixels(panel)
        half = len(colors) // 2
        assert colors[:half, :, 1].max() == 1 and colors[:half, :, 0].max() == 0
        assert colors[half:, :, 0].max() == 1 and colors[half:, :, 1].max() == 0
        np.testing.assert_allclose(colors[:half, :, 1].sum(), colors[half:, :, 0].sum(), rtol=1e-3)
    # From the side, both are seen where they are, although no plane holds both.
    assert "moving image cut 3000 mm further R" in notes(sagittal[0])
    assert look(sagittal[0], 15, 15).tolist() == [0, 1, 0] and look(sagittal[0], 15, 55).tolist() == [1, 0, 1]
    assert axial[3].get_title().endswith("shift 3000 mm, turn 0.0° removed")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_direction_to_a_missed_image_is_that_of_the_world(sign):
    """Also where the fixed grid counts its slices downwards."""
    image = on(np.diag([1.0, 1, 2 * sign, 1]), ball((12, 12, 12), (6, 6, 5), 3))
    affine = image.affine.numpy().copy()
    affine[2, 3] += 30
    figure = quality_figure(on(affine, image.as_tensor()), image, image, still(image))
    assert "moving image cut 30.0 mm further S" in notes(figure.axes[0])


@pytest.mark.parametrize("offset, together", [(100.0, True), (300.0, False)])
def test_images_next_to_each_other_share_a_panel(offset, together):
    image = on(np.eye(4), ball((30, 30), (15, 15), 14))
    affine = np.eye(4)
    affine[0, 3] = offset
    panel = quality_figure(on(affine, image.as_tensor()), image, image, still(image)).axes[0]
    assert any("side by side" in note for note in notes(panel)) != together
    if together:  # x grows to the left of a 2D picture
        assert look(panel, 29 - 15, 15).tolist() == [0, 1, 0]
        assert look(panel, 29 - 15 - offset, 15).tolist() == [1, 0, 1]


def test_a_sharp_step_of_brightness_stays_where_it_is():
    """The edge of an image is half a voxel beyond its last center, without fading, however thick the slices are."""
    image = on(np.diag([1.0, 1, 8, 1]), torch.ones(1, 20, 20, 4))
    panel = rows_of(quality_figure(image, image, image, still(image)))[1][1]
    assert look(panel, 10, -3.9).tolist() == [1, 1, 1] and look(panel, 10, 27.9).tolist() == [1, 1, 1]
    assert look(panel, 10, -4.3).tolist() == [0, 0, 0] and look(panel, 10, 28.3).tolist() == [0, 0, 0]


def test_the_checkerboard_alternates():
    fixed = on(np.eye(4), torch.ones(1, 64, 64))
    moved = on(np.eye(4), torch.full((1, 64, 64), 0.0))
    panel = quality_figure(fixed, fixed, moved, still(fixed)).axes[2]
    left, low = panel.get_xlim()[0], panel.get_ylim()[0]
    block = np.ptp(panel.get_xlim()) / 8
    assert block == pytest.approx(64 * 1.08 / 8)
    seen = np.array(
        [[look(panel, left + (i + 0.5) * block, low + (j + 0.5) * block) for j in range(1, 7)] for i in range(1, 7)]
    )
    assert np.array_equal(seen, 1 - np.indices((6, 6)).sum(axis=0) % 2)


@pytest.mark.parametrize("affine", [np.diag([1.0, 1, 3, 1]), np.diag([-1.0, 1, -3, 1]), oblique(3, (1, 1, 3))])
def test_folds_are_marked_where_they_are(affine):
    """A voxel pushed over its neighbor folds the cells around it: found on the planes that pass it, in millimeters."""
    shape, at = (25, 21, 9), (12, 10, 4)
    image = on(affine, torch.ones(1, *shape))
    ddf = folded_field(shape, at)
    figure = quality_figure(image, image, image, on(affine, ddf))
    share = folding_fraction(ddf[None]).item()
    assert share > 0 and fold_share(ddf) == pytest.approx(share, rel=1e-6)
    assert figure.axes[3].get_title().startswith(f"deformed grid, folding {percent(share)}\n")
    box = np.array([[0, 0, 0], np.array(shape) - 1])
    for view, row in zip(views(affine, shape, box), rows_of(figure)):
        found = marks(row[3])
        center = view.on_plane(np.array(at, dtype=float)[:, None])[:, 0]
        assert len(found) > 0 and (np.abs(found - center) <= np.array(view.step) / 2 + 1e-9).all()
    away = quality_figure(image, image, image, on(affine, folded_field(shape, (3, 3, 1))))
    assert not any(len(marks(row[3])) for row in rows_of(away))


@pytest.mark.parametrize("below, seen", [(3, False), (4, True), (5, True), (6, False)])
def test_folds_of_both_layers_that_touch_a_slice_are_marked(below, seen):
    """Layers pushed past the next one: folded is the layer of cells above voxel `below - 1`; the slice is voxel 4."""
    image = on(np.eye(4), torch.ones(1, 7, 6, 9))
    ddf = torch.zeros(3, 7, 6, 9)
    ddf[2, ..., :below] = 1.5
    axial, coronal, _ = rows_of(quality_figure(image, image, image, on(np.eye(4), ddf)))
    assert len(marks(axial[3])) == (6 * 5 if seen else 0)
    assert np.unique(marks(coronal[3])[:, 1]) == pytest.approx([below - 0.5])


def test_folds_too_small_to_be_seen_are_drawn_larger():
    panel = empty_figure(2, 2).add_axes((0, 0, 1, 1))
    cells = np.zeros((1000, 7), dtype=bool)
    cells[503, 6] = True
    draw_folds(panel, cells, (0.5, -1), (0.1, 2.0), smallest=0.35)
    (image,) = panel.get_images()
    assert image.get_extent() == pytest.approx([0.5, 100.5, -1, 13])
    assert pixels(panel).shape[:2] == (250, 7) and marks(panel) == pytest.approx(np.array([[0.5 + 125.5 * 0.4, 12]]))


@pytest.mark.parametrize("dims", [2, 3])
def test_turns_and_shifts_leave_the_grid_straight_and_are_named(dims):
    """Not so a scaling: its lines are farther apart by that factor."""
    angle, scale = np.deg2rad(70), 0.8
    turn = np.eye(dims)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    shape, spacing = (40, 30, 20)[:dims], np.array([1.0, 1.5, 2.0])[:dims]
    affine = np.diag([*spacing, *[1.0] * (4 - dims)])
    mm = np.indices(shape) * spacing.reshape(-1, *[1] * dims)
    middle = mm.reshape(dims, -1).mean(axis=1).reshape(-1, *[1] * dims)
    mapped = scale * np.einsum("ij,j...->i...", turn, mm - middle) + middle
    mapped[0] += 12
    image = on(affine, torch.ones(1, *shape))
    ddf = (mapped - mm) / spacing.reshape(-1, *[1] * dims)
    figure = quality_figure(image, image, image, on(affine, ddf))
    assert figure.axes[3].get_title() == "deformed grid, folding 0.00 %\n2 mm lines; shift 12.0 mm, turn 70.0° removed"
    for row in rows_of(figure):
        for lines, axis in zip(row[3].collections, (0, 1)):
            places = [path.vertices[:, axis] for path in lines.get_paths()]
            assert len(places) > 5 and max(np.ptp(place) for place in places) < 1e-4
            assert np.diff([place[0] for place in places]) == pytest.approx(2 / scale, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(6, 7, 5), (6, 7, 1)])
def test_the_turn_that_fits_best_is_found_for_mirrored_noise_and_single_slices(seed, shape):
    generator = np.random.default_rng(seed)
    spacing = np.array([1.0, 2.0, 3.0])
    start = np.indices(shape).reshape(3, -1) * spacing[:, None]
    turn = Rotation.random(random_state=seed).as_matrix() @ np.diag([1, 1, 1 if seed % 2 else -1])
    end = turn @ start + generator.normal(0, 0.3, start.shape)
    ddf = torch.from_numpy(((end - start) / spacing[:, None]).reshape(3, *shape))
    rotation, shift = rigid_part(ddf, spacing.tolist(), np.array([[0, 0, 0], np.array(shape) - 1]))
    assert np.linalg.det(rotation) == pytest.approx(1) and np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-9
    middle, target = start.mean(axis=1), end.mean(axis=1)
    assert rotation @ middle + shift == pytest.approx(target)
    best, _ = Rotation.align_vectors((end - target[:, None]).T, (start - middle[:, None]).T)
    np.testing.assert_allclose(rotation, best.as_matrix(), atol=1e-6)


@pytest.mark.parametrize("spacing", [0.3, 0.9, 1.7, 2.0, 7.3])
def test_every_voxel_center_is_a_point_of_a_panel(spacing):
    view = views(np.diag([spacing, 2 * spacing, 1.0]), (90, 80), np.array([[0, 0], [89, 79]]))[0]
    window = np.array([[-11.0, 91.0], [3.3, 80.0]])
    for found, step, (low, high) in zip(_raster(view, window, 200)[:2], view.step, window):
        assert found[0] <= low and found[-1] >= high and len(found) < 1000
        centers = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)
        assert np.abs(found[:, None] - centers).min(axis=0).max() < 1e-9


def test_labels_are_outlined_where_they_are():
    """Solid orange for the moved, dashed blue for the fixed label, closed also where a label reaches the edge."""
    image = on(np.diag([-2.0, 1, 1, 1]), torch.ones(1, 20, 16))
    moved_label, fixed_label = torch.zeros(1, 20, 16), torch.zeros(1, 20, 16, dtype=torch.int16)
    moved_label[0, 3:8, 0:6], fixed_label[0, 10:13, 4:9], fixed_label[0, 13:16, 4:9] = 1, 7, 2
    figure = quality_figure(image, image, image, still(image), moved_label, fixed_label)
    found = [
        (np.concatenate([path.vertices for path in lines.get_paths()]), lines) for lines in figure.axes[1].collections
    ]
    expected = [(3, 7, 0, 5), (13, 15, 4, 8), (10, 12, 4, 8)]
    assert len(found) == 3
    for (vertices, lines), (left, right, low, high) in zip(found, expected):
        # Axis 0 runs to the left of the world, as x of the picture runs: 2 mm a voxel.
        assert vertices.min(axis=0) == pytest.approx([2 * (left - 0.5), low - 0.5])
        assert vertices.max(axis=0) == pytest.approx([2 * (right + 0.5), high + 0.5])
        red, _, blue, _ = lines.get_edgecolor()[0]
        assert (red > blue) == (left == 3)
    assert "Outlines" in figure.texts[0].get_text()


def test_air_of_a_ct_is_dark_and_its_soft_tissue_has_contrast():
    """Air at -1000 on a background of -1024, with noise: fat and muscle differ, background is black."""
    generator = np.random.default_rng(0)
    values = generator.normal(-1000, 10, (1, 60, 60))
    values[0, 10:50, 10:50] = generator.normal(-100, 10, (40, 40))
    values[0, 20:30, 20:30] = generator.normal(50, 10, (10, 10))
    values[0, 40:45, 20:30] = generator.normal(500, 50, (5, 10))
    values[0, :5] = -1024
    image = GrayImage.of(torch.from_numpy(values), -1024.0, np.eye(3))
    background, air, fat, muscle, bone = image.at(np.array([[[2, 7, 15, 25, 42]], [[25, 25, 25, 25, 25]]]))[0]
    assert background == 0 and 0 < air < 0.1 and fat > air and muscle > fat + 0.15 and bone > muscle + 0.3
    # Another share of air does not change the gray of tissue in the overlay.
    fixed, other = on(np.eye(4), values), on(np.eye(4), np.where(np.indices(values.shape)[2] < 8, -1024, values))
    figure = quality_figure(fixed, other, fixed, still(fixed), background=-1024)
    color = look(figure.axes[1], 59 - 25, 25)
    assert color[0] == color[1] > 0.3


def test_each_image_is_scaled_by_its_own_content():
    """A mask, and an image a million times as bright, agree where they agree; a padded canvas changes nothing."""
    values = torch.rand(1, 20, 18) + 0.5
    fixed, moving = on(np.eye(4), values), on(np.eye(4), 1e6 * values)
    after = pixels(quality_figure(moving, fixed, moving, still(fixed)).axes[1])
    np.testing.assert_allclose(after[..., 0], after[..., 1], atol=1e-5)
    mask = on(np.eye(4), ball((20, 18), (9, 9)))
    panel = quality_figure(mask, mask, mask, still(mask)).axes[1]
    assert look(panel, 10, 9).tolist() == [1, 1, 1] and look(panel, 14, 13).tolist() == [0, 0, 0]
    plain = GrayImage.of(values, 0.0, np.eye(3))
    padded = GrayImage.of(torch.nn.functional.pad(values, [3, 4, 5, 6]), 0.0, np.eye(3))
    assert plain.limits == padded.limits and (padded.box - plain.box).tolist() == [[5, 3], [5, 3]]


@pytest.mark.parametrize(
    "shape, empty", [((5, 17), True), ((33, 7), False), ((3, 5, 7), True), ((8, 8, 1), False), ((2, 2, 2), False)]
)
def test_quality_of_odd_shapes_and_empty_images(tmp_path, shape, empty):
    affine = oblique(len(shape), np.array([1.0, 0.4, 6.0])[: len(shape)])
    image = on(affine, torch.zeros(2, *shape) if empty else torch.rand(2, *shape))
    figure = quality_figure(image, image, image, on(affine, 3 * torch.randn(len(shape), *shape)))
    assert save_figure(figure, tmp_path / "qc.png").stat().st_size > 1000


def test_quality_takes_any_type_and_changes_nothing():
    image = on(np.eye(4), torch.randint(-1000, 1000, (1, 12, 10, 8), dtype=torch.int16))
    field = on(np.eye(4), torch.randn(3, 12, 10, 8, dtype=torch.float16).requires_grad_())
    copies = image.clone(), field.detach().clone()
    figure = quality_figure(image, image, image, field, background=(0, -1))
    assert 0 <= pixels(figure.axes[1]).min() and pixels(figure.axes[1]).max() <= 1
    assert torch.equal(image, copies[0]) and torch.equal(field.detach(), copies[1])


def test_quality_of_real_images(shared_data, tmp_path):
    """Two crops of hippocampi, unregistered: the whole picture, of a size a screen can hold."""
    folder = shared_data / "Task04_Hippocampus" / "imagesTr"
    moving, fixed = (
        on(image.affine, image.get_fdata(dtype=np.float32)[None])
        for image in map(nib.load, sorted(folder.glob("hippocampus_*.nii.gz"))[:2])
    )
    # Nothing is registered: the moving image resampled to the fixed grid is seen before and after.
    moving_from_fixed = np.linalg.solve(moving.affine.numpy(), fixed.affine.numpy())
    grid = identity_grid(list(fixed.shape[1:]), dtype=torch.float64).numpy()[0]
    index = np.einsum("ij,j...->i...", moving_from_fixed[:3, :3], grid) + moving_from_fixed[:3, 3, None, None, None]
    moved = warp(moving.as_tensor()[None], torch.from_numpy(index - grid)[None].float(), padding="zeros")[0]
    figure = quality_figure(moving, fixed, on(fixed.affine, moved), still(fixed), title="nothing done")
    box = content_box(fixed.as_tensor()[0] != 0)
    for view, row in zip(views(fixed.affine.numpy(), fixed.shape[1:], box), rows_of(figure)):
        right, up = view.positions()
        before, after = (np.array([[look(panel, x, y) for y in up[1:-1]] for x in right[1:-1]]) for panel in row[:2])
        np.testing.assert_allclose(before[..., 1], after[..., 1], atol=1e-5)
        assert (np.abs(before[..., 0] - after[..., 0]) < 1e-5).mean() > 0.9 and np.ptp(after[..., 0]) > 0.5
    path = save_figure(figure, tmp_path / "qc.png")
    assert 100_000 < path.stat().st_size < 10_000_000


def quality_arguments():
    image = on(np.eye(4), torch.ones(1, 8, 9))
    return {"moving": image, "fixed": image, "moved": image, "fixed_to_moving": still(image)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moving": torch.zeros(1, 8, 9)}, "expects moving to be a MetaTensor, whose affine .* got Tensor"),
        ({"fixed_to_moving": torch.zeros(2, 8, 9)}, "expects fixed_to_moving to be a MetaTensor"),
        ({"moved": on(np.eye(4), torch.zeros(1, 9, 8))}, r"on one other grid.*moved \[1, 9, 8\]"),
        ({"moving": on(np.eye(4), torch.zeros(1, 8, 9, 7))}, r"moving \[1, 8, 9, 7\], fixed \[1, 8, 9\]"),
        ({"fixed_to_moving": on(np.eye(4), torch.zeros(3, 8, 9))}, r"fixed_to_moving \[3, 8, 9\]"),
        ({"moved_label": torch.zeros(1, 9, 9)}, r"moved_label \[1, 9, 9\]"),
        ({"moving": on(np.eye(4), torch.zeros(1, 0, 9))}, r"moving \[1, 0, 9\]"),
        ({"moved": on(np.diag([1, 1.01, 1, 1]), torch.ones(1, 8, 9))}, "expects moved on the grid of fixed"),
        ({"fixed_to_moving": on(np.diag([-1.0, 1, 1, 1]), torch.ones(2, 8, 9))}, "fixed_to_moving on the grid of"),
        ({"fixed": on(np.diag([0.0, 1, 1, 1]), torch.ones(1, 8, 9))}, "should be finite with positive spacing"),
        ({"moved": on(np.eye(4), torch.full((1, 8, 9), torch.nan))}, "infinity in moved"),
        ({"fixed_to_moving": on(np.eye(4), torch.full((2, 8, 9), torch.inf))}, "infinity in fixed_to_moving"),
        ({"background": float("nan")}, "one background or two, finite numbers, got nan"),
        ({"background": (0.0, 1.0, 2.0)}, "one background or two"),
        ({"background": "dark"}, "one background or two"),
    ],
)
def test_quality_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        quality_figure(**{**quality_arguments(), **change})


def test_quality_names_a_missing_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="need matplotlib"):
        quality_figure(**quality_arguments())
