"""A refinement without weights: least squares say where each voxel's surroundings fit better (Lucas and Kanade)."""

from typing import List

import torch
from torch import nn

from ..fields import compose, full_precision, warp
from ..windows import gaussian_blur
from .active import check_pair, is_count, keep_if_content

__all__ = ["LucasKanade"]


class LucasKanade(nn.Module):
    """Refine by optical flow: move each voxel to where its surroundings fit best, as the slopes there promise.

    Images are compared by their local contrast, `(I - mean) / deviation` in Gaussian windows of three sizes. In each
    round the displacement of a voxel is the least squares solution of `slope . step = fixed - moved` in a small window
    around it, damped, smoothed, and composed with what there is. `slope` is the mean of both images' slopes, which
    makes the steps of second order.

    Every equation counts as much as the images agree around it: with a power of their correlation in a wider window,
    and not at all where that is negative. Images of another contrast are left as they lie.

    There are no weights, and no direction is special: when both images are turned by quarters of a turn or mirrored, or
    moved together with four voxels of background around them, the answer turns and moves with them. Equal images get
    zero, but for rounding.

    References: Lucas and Kanade, "An Iterative Image Registration Technique with an Application to Stereo Vision",
    IJCAI 1981; the mean of both slopes: Benhimane and Malis, "Real-time image-based tracking of planes using efficient
    second-order minimization", IROS 2004, doi:10.1109/IROS.2004.1389474.

    Intensities are expected from 0 to 1 or so: contrast far below 0.1 is taken for noise.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of an image.
        rounds: how often images are warped and compared.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from equireg.fields import identity_grid
        >>> cone = (8 - (identity_grid([25, 25]) - 12).norm(dim=1, keepdim=True)).clamp(min=0) / 8
        >>> ddf = LucasKanade(spatial_dims=2, rounds=8)(cone.roll(1, dims=2), cone)
        >>> [round(value, 1) + 0.0 for value in ddf[0, :, 12, 12].tolist()]  # the moving cone lies a voxel further
        [1.0, 0.0]
    """

    __constants__ = ["damping", "longest", "sizes", "smoothing", "trust", "trust_size", "variance", "window"]
    sizes = (1.0, 2.0, 4.0)  # standard deviations of the windows of local contrast, voxels, as all that follow
    variance = 1e-3  # added to local variances, in squared intensities from 0 to 1: flat regions are no structure
    window = 1.0  # in which equations are joined
    smoothing = 1.0  # of a step
    damping = 0.02  # added to the squared slopes
    longest = 2.0  # that a step may be: so far slopes tell
    trust_size = 4.0  # of the window in which images agree or not
    trust = 6  # power of their correlation

    def __init__(self, spatial_dims: int, in_channels: int = 1, rounds: int = 4) -> None:
        super().__init__()
        if not is_count(spatial_dims, 2) or spatial_dims > 3 or not is_count(in_channels, 1):
            raise ValueError(
                f"spatial_dims must be 2 or 3 and in_channels an integer of at least 1, got {spatial_dims!r} and "
                f"{in_channels!r}."
            )
        if not is_count(rounds, 1):
            raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.rounds = rounds

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images that lie within a few voxels of each other.

        Args:
            moving: `(B, C, *moving shape)`, background 0, on the grid of the fixed image, which may reach further.
            fixed: `(B, C, *fixed shape)`, background 0.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels; zero for a sample of which either image is empty.

        Raises:
            ValueError: if the images do not fit the network or each other.
        """
        check_pair(moving, fixed, self.spatial_dims, self.in_channels)
        if torch.jit.is_scripting():
            return self._flow(moving, fixed)
        else:  # TorchScript does not compile this branch
            with torch.autocast(moving.device.type, enabled=False):  # differences of means need all digits
                return self._flow(moving, fixed)

    def _flow(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the answer, `(B, D, *fixed shape)`."""
        there, here = self._contrast(full_precision(moving)), self._contrast(full_precision(fixed))
        size = here.shape[1]
        inside, around = _around(moving, here.dtype), _around(fixed, here.dtype)
        content = (fixed != 0).any(dim=1, keepdim=True).to(here.dtype)
        there = torch.cat([there, inside], dim=1)
        slopes, known = _slopes(here), self._windowed(torch.cat([content, here, here * here], dim=1) * content)
        ddf = torch.zeros_like(content).repeat([1, self.spatial_dims] + [1] * self.spatial_dims)
        for _ in range(self.rounds):
            moved = warp(there, ddf, mode="linear", padding="zeros")
            moved, shared = moved[:, :size], moved[:, size:] * around
            weight = shared * self._agreement(moved, here, content, known)
            joint = [0.5 * (a + b) for a, b in zip(slopes, _slopes(moved))]
            step = self._solved(joint, here - moved, weight)
            ddf = compose(ddf, gaussian_blur(step, self.smoothing))
        return keep_if_content(ddf, moving, fixed)

    def _contrast(self, image: torch.Tensor) -> torch.Tensor:
        """Return the local contrast in windows of each size, `(B, sizes * C, *shape)`, without a unit."""
        maps: List[torch.Tensor] = []
        for size in self.sizes:
            mean, square = gaussian_blur(torch.cat([image, image * image], dim=1), size).chunk(2, dim=1)
            maps.append((image - mean) / (torch.relu(square - mean * mean) + self.variance).sqrt())
        return torch.cat(maps, dim=1)

    def _windowed(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the mean over the wide window."""
        return gaussian_blur(maps, self.trust_size)

    def _agreement(
        self, moved: torch.Tensor, here: torch.Tensor, content: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """Return how far to trust each equation, from 0 to 1, of the shape of the maps.

        `known` holds the windowed content, fixed maps and their squares: they are the same in each round.
        """
        maps = torch.cat([moved, moved * moved, moved * here], dim=1) * content
        a, aa, ab = self._windowed(maps).chunk(3, dim=1)
        share = known[:, :1].clamp(min=1e-6)
        b, bb = known[:, 1:].chunk(2, dim=1)
        a, b = a / share, b / share
        variances = torch.relu(aa / share - a * a) * torch.relu(bb / share - b * b)
        return torch.relu((ab / share - a * b) / (variances + 1e-6).sqrt()) ** self.trust

    def _solved(self, slopes: List[torch.Tensor], rest: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the damped least squares solution around each voxel, `(B, D, *shape)`, voxels, of limited length."""
        terms: List[torch.Tensor] = []
        for i, one in enumerate(slopes):
            weighted = weight * one
            for other in slopes[i:]:
                terms.append((weighted * other).sum(dim=1, keepdim=True))
            terms.append((weighted * rest).sum(dim=1, keepdim=True))
        joined = gaussian_blur(torch.cat(terms, dim=1), self.window)
        if self.spatial_dims == 2:
            xx, xy, x, yy, y = joined.split(1, dim=1)
            xx, yy = xx + self.damping, yy + self.damping
            step = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / (xx * yy - xy * xy)
        else:
            xx, xy, xz, x, yy, yz, y, zz, z = joined.split(1, dim=1)
            xx, yy, zz = xx + self.damping, yy + self.damping, zz + self.damping
            # Cofactors: the matrix is symmetric, and damping makes it positive.
            a, b, c = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
            d, e, f = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
            solution = [a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z]
            step = torch.cat(solution, dim=1) / (xx * a + xy * b + xz * c)
        length = (step.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()
        return step * (self.longest / length.clamp(min=self.longest))


def _around(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return where there is content or its border is near, `(B, 1, *shape)`, 1 or 0.

    Without the voxels just beyond it the border of the content would be drawn inward by those within, and by nothing
    outward.
    """
    content = (image != 0).any(dim=1, keepdim=True).to(dtype)
    return (gaussian_blur(content, 1.0) > 0.1).to(dtype)


def _slopes(maps: torch.Tensor) -> List[torch.Tensor]:
    """Return the central differences along each axis, per voxel; beyond the border maps go on as they end."""
    slopes: List[torch.Tensor] = []
    for k in range(2, maps.dim()):
        size = maps.shape[k]
        long = torch.cat([maps.narrow(k, 0, 1), maps, maps.narrow(k, size - 1, 1)], dim=k)
        slopes.append(0.5 * (long.narrow(k, 2, size) - long.narrow(k, 0, size)))
    return slopes
