"""ANTs reads our transforms and makes the same of them; run by `make test-ants`, in an environment that has ANTsPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_bundle import random_network
from helpers_grids import lps
from test_registration import SHAPES, files

from equireg.images import read_image
from equireg.registration import register
from equireg.results import save_registration
from equireg.transform_files import read_transform
from equireg.world import index_displacement, map_points

ants = pytest.importorskip("ants", reason="needs ANTsPy: make test-ants")


@pytest.mark.parametrize("kind", ["fixed_to_moving", "fixed_to_moving_h5"])
@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("dims", [2, 3])
def test_ants_apply_transforms_makes_the_same_moved_image(dims: int, seed: int, kind: str, tmp_path: Path) -> None:
    moving, fixed = files(tmp_path, dims, seed)
    result = register(moving, fixed, weights=random_network(dims).net)
    out = save_registration(result, tmp_path / "out", exports=["h5"], picture=False)
    theirs = ants.apply_transforms(
        fixed=ants.image_read(str(fixed)),
        moving=ants.image_read(str(moving)),
        transformlist=[str(out[kind])],
        interpolator="linear",
    ).numpy()
    ours = result.moved[0].numpy()
    at = index_displacement(result.fixed_to_moving, result.pair["moving"]).numpy() + np.indices(SHAPES[dims][1])
    inside = ((at >= 1) & (at <= np.reshape(SHAPES[dims][0], [-1] + [1] * dims) - 2)).all(axis=0)
    span = float(result.pair["moving"].max() - result.pair["moving"].min())
    assert inside.sum() > 50 and np.abs(ours - theirs)[inside].max() < 1e-3 * span


def test_the_transforms_of_ants_take_points_where_ants_does(tmp_path: Path) -> None:
    """Its affine (.mat) and its warp (.nii.gz), in the order in which points pass through them."""
    moving, fixed = files(tmp_path, 3)
    found = ants.registration(
        ants.image_read(str(fixed)), ants.image_read(str(moving)), "SyN", reg_iterations=(5, 0), random_seed=1
    )
    warp, affine = found["fwdtransforms"]  # applied last to first: points go through the warp, then through the affine
    steps = [*read_transform(warp), *read_transform(affine)]
    image = read_image(fixed)
    index = np.random.default_rng(0).uniform(3, np.array(SHAPES[3][1]) - 4, (20, 3))
    points = index @ image.affine.numpy()[:3, :3].T + image.affine.numpy()[:3, 3]
    import pandas
    import torch

    table = pandas.DataFrame(points * lps(3), columns=list("xyz"))
    theirs = ants.apply_transforms_to_points(3, table, [warp, affine]).to_numpy()[:, :3] * lps(3)
    assert np.abs(map_points(torch.from_numpy(points), steps).numpy() - theirs).max() < 1e-3
