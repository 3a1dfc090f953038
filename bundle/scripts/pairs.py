"""A pair to register, as it is read from files: images, labels, masks and landmarks, checked against each other."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from .images import read_image, read_label, read_mask
from .io import itk_grid_affine
from .landmarks import Landmarks, check_inside, read_landmarks
from .lists import listed_pairs
from .transform_files import read_affine

__all__ = ["PAIR_KEYS", "PairFromImaged", "fingerprint", "fingerprints", "input_names", "read_pair"]

# What a pair may consist of, and the image whose grid or space each part shares.
_LABELS = {"moving_label": "moving", "fixed_label": "fixed"}
_MASKS = {"moving_mask": "moving", "fixed_mask": "fixed", "similarity_mask": "fixed"}
_POINTS = {"moving_points": "moving", "fixed_points": "fixed"}
PAIR_KEYS = ("moving", "fixed", *_LABELS, *_MASKS, *_POINTS, "initial_transform")


def read_pair(
    sources: Mapping[str, Any], spatial_dims: int | None = None, point_frame: str | None = None
) -> dict[Any, Any]:
    """Read the parts of a pair and check that they belong together.

    Args:
        sources: any of `PAIR_KEYS` to where it comes from; None and what is not there is left out.
            `moving`, `fixed`: see `equireg.images.read_image`. `moving_label`, `fixed_label`, `moving_mask`,
            `fixed_mask`, `similarity_mask` (on the fixed image): label maps on their image's own grid.
            `moving_points`, `fixed_points`: `Landmarks`, points `(N, D)` in RAS+ millimeters, or a file, inside their
            image. `initial_transform`: an affine `(D + 1, D + 1)` from fixed to moving points, RAS+ millimeters, or
            an ITK file of one.
        spatial_dims: 2 or 3, what the images should be; as they are if left out.
        point_frame: frame of CSV files of landmarks, see `equireg.landmarks.read_landmarks`.

    Returns:
        The same keys: images, labels and masks as `MetaTensor`s `(1, *shape)`, `Landmarks`, and the affine as a tensor.

    Raises:
        ValueError: naming the file, for whatever is missing, damaged or does not fit.
        ImportError: if a format needs a package that is not installed.
    """
    unknown = [key for key in sources if key not in PAIR_KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], PAIR_KEYS, 1)
        hint = f", did you mean '{near[0]}'" if near else ""
        raise ValueError(f"a pair has no part '{unknown[0]}'{hint}: expected {', '.join(PAIR_KEYS)}.")
    given = {key: source for key, source in sources.items() if source is not None}
    pair: dict[Any, Any] = {}
    for key in ("moving", "fixed"):
        if key not in given:
            raise ValueError(f"a pair needs a moving and a fixed image, got no {key} one.")
        pair[key] = read_image(given[key], f"{key} image", spatial_dims)
        _require_itk_grid(pair[key], given[key], key)
    if pair["moving"].dim() != pair["fixed"].dim():
        raise ValueError(
            f"moving and fixed image should both be 2D or both 3D, got shapes {list(pair['moving'].shape[1:])} and "
            f"{list(pair['fixed'].shape[1:])}."
        )
    dims = pair["fixed"].dim() - 1
    for key in ("moving", "fixed"):
        if dims == 3 and 1 in pair[key].shape[1:]:
            raise ValueError(f"the {key} image is a single slice, {list(pair[key].shape[1:])}: register it in 2D.")
    for key, source in given.items():
        role = key.replace("_", " ")
        if key in _LABELS:
            pair[key] = read_label(source, role, like=pair[_LABELS[key]])
        elif key in _MASKS:
            pair[key] = read_mask(source, role, like=pair[_MASKS[key]])
        elif key in _POINTS:
            pair[key] = _read_points(source, pair[_POINTS[key]], point_frame)
        elif key == "initial_transform":
            pair[key] = _initial_affine(source, dims)
    if "moving_points" in pair and "fixed_points" in pair:
        counts = [len(pair[key].points_mm) for key in ("moving_points", "fixed_points")]
        if counts[0] != counts[1]:
            raise ValueError(
                f"moving and fixed landmarks should correspond one to one, got {counts[0]} and {counts[1]}."
            )
    return pair


class PairFromImaged(Transform):
    """Make a pair of files of the one image that a host serves, which is the fixed one, and a moving one beside it.

    MONAI Label hands over the path of its `image` and whatever else its client sent. An item that has a fixed image
    already passes unchanged.

    Args:
        image_key: path of the image that the host serves.
        moving_key: path of the moving image; a relative one starts from the folder of the fixed image.
        fixed_key: where the path of the fixed image goes.

    Raises:
        ValueError: when called, if the item lacks either image, or there is no such file.

    Example:
        >>> PairFromImaged()({"moving": "a.nii", "fixed": "b.nii"})
        {'moving': 'a.nii', 'fixed': 'b.nii'}
    """

    def __init__(self, image_key: str = "image", moving_key: str = "moving", fixed_key: str = "fixed") -> None:
        self.image_key, self.moving_key, self.fixed_key = image_key, moving_key, fixed_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the item with both paths."""
        item = dict(data)
        if self.fixed_key in item:
            return item
        fixed, moving = item.get(self.image_key), item.get(self.moving_key)
        if not fixed or not moving:
            raise ValueError(
                f"a pair needs a fixed image '{self.image_key}' and a moving image '{self.moving_key}', got {fixed!r} "
                f"and {moving!r}."
            )
        (pair,) = listed_pairs(None, str(Path(fixed).parent / moving), str(fixed))
        return {**item, self.moving_key: pair["moving"], self.fixed_key: pair["fixed"]}


def input_names(sources: Mapping[str, Any]) -> dict[str, str | None]:
    """Say where the parts of a pair come from.

    Args:
        sources: as for `read_pair`.

    Returns:
        The absolute path of each part that is a file, None for one that was in memory.

    Example:
        >>> input_names({"moving": torch.zeros(1, 2, 2), "fixed": "/data/fixed.nii.gz"})
        {'moving': None, 'fixed': '/data/fixed.nii.gz'}
    """
    given = {key: sources[key] for key in PAIR_KEYS if sources.get(key) is not None}
    return {key: str(Path(at).absolute()) if isinstance(at, (str, Path)) else None for key, at in given.items()}


def fingerprints(sources: Mapping[str, Any]) -> dict[str, list[int] | None]:
    """Say in which state the files of a pair are, so that another state of them can be told.

    Args:
        sources: as for `read_pair`.

    Returns:
        Bytes and time of the last change of each part, of all files of a folder; None for what was in memory.
    """
    names = input_names(sources)
    return {key: None if name is None else fingerprint(name) for key, name in names.items()}


def fingerprint(path: str | Path) -> list[int]:
    """Say in which state a file is.

    Args:
        path: file or folder; it need not be there.

    Returns:
        Bytes and time of the last change, of all files of a folder; zeros where there is nothing.
    """
    path = Path(path)
    # A header such as .mhd or .nhdr has its values in a file beside it.
    beside = path.parent.glob(f"{path.stem}.*") if path.suffix.lower() in (".mhd", ".nhdr") else [path]
    files = [file for file in (path.rglob("*") if path.is_dir() else beside) if file.is_file()]
    states = [file.stat() for file in files]
    return [sum(state.st_size for state in states), sum(state.st_mtime_ns for state in states)]


def _initial_affine(source: Any, dims: int) -> torch.Tensor:
    """Return an affine between points, from a file or an array."""
    in_memory = isinstance(source, (torch.Tensor, np.ndarray))
    affine = torch.as_tensor(source, dtype=torch.float64) if in_memory else read_affine(source)
    last_row = torch.tensor([*[0.0] * dims, 1.0], dtype=torch.float64)
    if affine.shape != (dims + 1, dims + 1) or not torch.equal(affine[-1], last_row):
        raise ValueError(
            f"the initial transform should be an affine of {dims}D points, {dims + 1} x {dims + 1} with a last row of "
            f"zeros and a one, got {affine.tolist()}."
        )
    if not bool(torch.isfinite(affine).all()) or not torch.linalg.det(affine[:dims, :dims]).abs() > 1e-9:
        raise ValueError(f"the initial transform should be finite and have an inverse, got {affine.tolist()}.")
    return affine


def _require_itk_grid(image: MetaTensor, source: Any, key: str) -> None:
    """Refuse a grid on which a transform that ITK reads could not be written."""
    try:
        itk_grid_affine(image.affine, image.dim() - 1)
    except ValueError as error:
        name = f" '{source}'" if isinstance(source, (str, Path)) else ""
        raise ValueError(f"the {key} image{name} should be resampled to a plain grid first: {error}") from error


def _read_points(source: Any, image: Any, frame: str | None) -> Landmarks:
    """Read landmarks that lie in an image."""
    if isinstance(source, (torch.Tensor, np.ndarray)):
        source = Landmarks(torch.as_tensor(source))
    if isinstance(source, Landmarks):
        check_inside(source, image.affine, image.shape[1:], "landmarks")
        return source
    landmarks = read_landmarks(Path(source), image.affine, frame, dims=image.dim() - 1)
    check_inside(landmarks, image.affine, image.shape[1:], source)
    return landmarks
