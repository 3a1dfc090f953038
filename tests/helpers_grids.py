"""What the tests of geometry share: random oblique grids, smooth fields, and SimpleITK's view of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from equireg.world import as_field


def grid(dims: int, seed: int, spacing: Sequence[float] | None = None, angle: float = 180.0) -> np.ndarray:
    """Return a random affine `(4, 4)`: turned by up to an angle in degrees, axes in any order, possibly mirrored."""
    random = np.random.default_rng(seed)
    steps = np.asarray(spacing if spacing is not None else random.uniform(0.6, 2.5, dims))
    if dims == 3:
        axis = random.normal(size=3)
        turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.deg2rad(random.uniform(0, angle))).as_matrix()
    else:
        t = np.deg2rad(random.uniform(-angle, angle))
        turn = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    affine = np.eye(4)
    affine[:dims, :dims] = turn[:, random.permutation(dims)] * random.choice([-1, 1], dims) * steps
    affine[:dims, 3] = random.uniform(-80, 80, dims)
    return affine


def smooth(shape: Sequence[int], seed: int, sigma: float = 3.0, channels: int = 1) -> np.ndarray:
    """Return smooth random values `(channels, *shape)` with standard deviation 1."""
    noise = np.random.default_rng(seed).normal(size=(channels, *shape))
    values = np.stack([gaussian_filter(channel, sigma, mode="nearest") for channel in noise])
    return values / values.std()


def image(shape: Sequence[int], affine: np.ndarray, seed: int = 0) -> MetaTensor:
    """Return a smooth image `(1, *shape)`, values around 100."""
    values = 100 + 30 * smooth(shape, seed)
    return MetaTensor(torch.from_numpy(values).float(), affine=torch.from_numpy(affine))


def field(shape: Sequence[int], affine: np.ndarray, seed: int = 0, strength: float = 1.0) -> MetaTensor:
    """Return a smooth displacement field of about so many voxels."""
    return as_field(torch.from_numpy(strength * smooth(shape, seed, 4.0, len(shape))), affine)


def centered(affine: np.ndarray, shape: Sequence[int], center: Sequence[float]) -> np.ndarray:
    """Move a grid so that its center lies at a point of the world."""
    dims, moved = len(shape), affine.copy()
    moved[:dims, 3] = np.asarray(center) - affine[:dims, :dims] @ ((np.asarray(shape) - 1) / 2)
    return moved


def lps(dims: int) -> np.ndarray:
    """Return the signs that turn RAS+ into LPS+."""
    return np.array([-1.0, -1.0, 1.0])[:dims]


def to_itk(values: MetaTensor) -> sitk.Image:
    """Return an image `(1, *shape)` as SimpleITK sees it, made without any of the code under test."""
    dims = values.dim() - 1
    affine = values.affine.numpy()
    spacing = np.linalg.norm(affine[:dims, :dims], axis=0)
    result = sitk.GetImageFromArray(np.ascontiguousarray(values[0].numpy().T))
    result.SetSpacing(spacing.tolist())
    result.SetOrigin((lps(dims) * affine[:dims, 3]).tolist())
    result.SetDirection((lps(dims)[:, None] * affine[:dims, :dims] / spacing).flatten().tolist())
    return result
