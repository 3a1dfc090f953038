"""Losses for unsupervised registration: similarity of images, regularity of ddfs, and the loss that joins them.

The losses here are those that MONAI lacks, or has under the same name with other values; each works alone, inside
`RegistrationLoss`, and from a configuration file by its `_target_`. What MONAI has is used as it is: any of its losses
`f(pred, target)` is a `similarity`, and `monai.losses.BendingEnergyLoss` is a `regularity` on second derivatives.
All computations run in float32 or better, also under automatic mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.utils import convert_to_tensor
from torch.nn.modules.loss import _Loss

from .fields import full_precision, identity_grid, warp
from .mind import MINDSSCLoss, check_weight
from .windows import gaussian_blur

__all__ = [
    "CorrespondenceLoss",
    "DiffusionLoss",
    "GradICONLoss",
    "LabeledSimilarity",
    "LocalCorrelationLoss",
    "MINDSSCLoss",
    "RegistrationLoss",
]


def _check_ddf(ddf: torch.Tensor, name: str, owner: str, dims: tuple[int, ...]) -> None:
    """Raise a ValueError unless `ddf` is `(B, D, *spatial)` with D spatial axes, D one of `dims`."""
    if ddf.dim() - 2 not in dims or ddf.shape[1] != ddf.dim() - 2:
        raise ValueError(
            f"{owner} expects {name} of shape (B, D, *spatial) with D = {' or '.join(map(str, dims))} spatial axes, "
            f"got {list(ddf.shape)}."
        )


class LocalCorrelationLoss(_Loss):
    """One minus the mean correlation of two images in a Gaussian window around each voxel (LNCC).

    With `g` the window, `cc = cov(I, J) / sqrt((relu(var(I)) + eps) (relu(var(J)) + eps))`, where
    `cov(I, J) = g*(I J) - (g*I) (g*J)` and `var(I) = cov(I, I)`; the loss is `1 - mean(cc)`, from 0 (match) over 1 (no
    relation, and flat windows, such as background) to 2 (contrast inverted). The squared form `1 - mean(cc^2)` lies in
    [0, 1] and is blind to the sign of the contrast, which suits images of different modalities.

    `monai.losses.LocalNormalizedCrossCorrelationLoss` is another function: it is `-mean(cc^2)`, stabilizes window
    sums instead of means, cuts its window near 1.4 sigma, and cannot have sigma 4.

    Reference: Greer et al., "CARL: A Framework for Equivariant Image Registration", https://arxiv.org/abs/2405.16738,
    and its authors' implementation.

    Args:
        sigma: standard deviation of the window in voxels. The window ends at two sigma (17 voxels at sigma 4), its
            weights sum to one, and images continue as 0 outside their grid.
        squared: use the squared correlation.
        eps: added to both variances, in squared intensities; images are expected in [0, 1].

    Raises:
        ValueError: if `sigma` or `eps` is not positive.

    Example:
        >>> image, loss = torch.rand(1, 1, 32, 32), LocalCorrelationLoss()
        >>> round(loss(image, image).item(), 2), round(loss(image, -image).item(), 2)
        (0.0, 2.0)
    """

    def __init__(self, sigma: float = 4.0, squared: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        if not (sigma > 0 and eps > 0):
            raise ValueError(f"LocalCorrelationLoss expects positive sigma and eps, got {sigma} and {eps}.")
        self.sigma = float(sigma)
        self.squared = squared
        self.eps = float(eps)

    def forward(self, pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Compare two images on one grid; the order of the two does not matter.

        Args:
            pred: `(B, C, *spatial)` with one to three spatial axes; channels are compared one by one.
            target: the same shape.
            weight: `(B, 1, *spatial)`, not negative: how much the window around each voxel counts in the mean; all
                the same if left out. The windows themselves are not cut by it.

        Returns:
            scalar, no unit.

        Raises:
            ValueError: if the shapes differ or are not of that form, or for a weight that is no such map.
        """
        if pred.shape != target.shape or pred.dim() not in (3, 4, 5):
            raise ValueError(
                "LocalCorrelationLoss expects two images of one shape (B, C, *spatial) with 1 to 3 spatial axes, "
                f"got {list(pred.shape)} and {list(target.shape)}."
            )
        check_weight(weight, pred, "LocalCorrelationLoss")
        # Half precision cannot hold the difference of two means: leave autocast.
        with torch.autocast(pred.device.type, enabled=False):
            a, b = full_precision(pred), full_precision(target)
            maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)
            mean_a, mean_b, aa, bb, ab = gaussian_blur(maps, self.sigma).chunk(5, dim=1)
            covariance = ab - mean_a * mean_b
            # Rounding can make a variance slightly negative.
            variances = (torch.relu(aa - mean_a**2) + self.eps) * (torch.relu(bb - mean_b**2) + self.eps)
            similarity = covariance**2 / variances if self.squared else covariance / torch.sqrt(variances)
            if weight is None:
                return 1.0 - similarity.mean()
            weight = full_precision(weight).expand(similarity.shape)
            return 1.0 - (weight * similarity).sum() / weight.sum()


class DiffusionLoss(_Loss):
    """Mean squared forward difference of a ddf, summed over the axes.

    `monai.losses.DiffusionLoss` takes central differences on the interior: about equal for smooth fields, but blind to
    displacements that alternate from voxel to voxel, and it refuses axes of fewer than three voxels. Here differences
    are between neighbors, each axis counts all of them, and an axis of one voxel contributes 0.

    Example:
        >>> round(DiffusionLoss()(0.1 * identity_grid([8, 8])).item(), 6)  # each axis stretches one of two components
        0.01
    """

    def forward(self, ddf: torch.Tensor) -> torch.Tensor:
        """Measure how much neighboring displacements differ.

        Args:
            ddf: `(B, D, *spatial)`, voxels, D from 1 to 3.

        Returns:
            scalar, voxels^2 per voxel^2; the mean is over batch, components and pairs of neighbors.

        Raises:
            ValueError: if the shape is not of that form.
        """
        _check_ddf(ddf, "a ddf", "DiffusionLoss", (1, 2, 3))
        ddf = full_precision(ddf)
        axes = [axis for axis in range(2, ddf.dim()) if ddf.shape[axis] > 1]
        # The empty sum keeps the graph, so that a single voxel has a gradient (zero) too.
        return sum((ddf.diff(dim=axis).square().mean() for axis in axes), start=0.0 * ddf.sum())


class GradICONLoss(_Loss):
    """Mean squared gradient of the inverse consistency error of two ddfs: it lets large smooth motion pass.

    At points `x`, the moving voxels plus Gaussian noise, the error of going to the fixed image and back is
    `e(x) = ddf_moving_to_fixed(x) + ddf_fixed_to_moving(x + ddf_moving_to_fixed(x))`. The loss is the sum over axes `k`
    of the mean over batch, components and points of `((e(x + step k) - e(x)) / step)^2`.
    Steps and noise are in voxels along every axis, where the authors use fractions of the image; the defaults are
    theirs for an image of about 200 voxels an axis. Outside its grid a ddf continues as its border values.

    Reference: Tian et al., "GradICON: Approximate Diffeomorphisms via Gradient Inverse Consistency", CVPR 2023,
    https://arxiv.org/abs/2206.05897.

    Args:
        step: length of the finite difference in voxels.
        noise: standard deviation of the points around the voxel centers, in voxels; one draw serves a whole batch.
        seed: draws the same points at every call, on any device; None draws from torch's global generator.
        stride: take the points around every `stride`-th voxel along each axis only; with 2, an eighth of the points
            and about a quarter of the time in 3D. `noise=2.0` then reaches the voxels between, as the authors have it.

    Raises:
        ValueError: if `step` or `stride` is not positive or `noise` is negative.

    Example:
        >>> there = torch.full((1, 2, 8, 8), 3.0)
        >>> GradICONLoss()(there, -there).item() < 1e-9
        True
    """

    def __init__(self, step: float = 0.2, noise: float = 1.0, seed: int | None = None, stride: int = 1) -> None:
        super().__init__()
        if not (step > 0 and noise >= 0 and stride >= 1):
            raise ValueError(
                f"GradICONLoss expects step > 0, noise >= 0 and stride >= 1, got {step}, {noise} and {stride}."
            )
        self.step = float(step)
        self.noise = float(noise)
        self.seed = seed
        self.stride = stride

    def _points(self, ddf: torch.Tensor) -> torch.Tensor:
        """Draw the points, as displacements of the `(1, D, *ceil(moving shape / stride))` grid, voxels."""
        shape = [-(-size // self.stride) for size in ddf.shape[2:]]
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        device = ddf.device if generator is None else torch.device("cpu")  # one seed, the same points on all devices
        noise = torch.randn((1, len(shape), *shape), dtype=ddf.dtype, device=device, generator=generator)
        return (self.stride - 1) * identity_grid(shape, ddf.dtype, ddf.device) + self.noise * noise.to(ddf.device)

    def forward(self, ddf_fixed_to_moving: torch.Tensor, ddf_moving_to_fixed: torch.Tensor) -> torch.Tensor:
        """Measure how far the second ddf is from inverting the first one, up to a constant shift.

        Args:
            ddf_fixed_to_moving: `(B, D, *fixed shape)`, voxels, D = 2 or 3.
            ddf_moving_to_fixed: `(B, D, *moving shape)`, voxels; the two shapes may differ.

        Returns:
            scalar, voxels^2 per voxel^2.

        Raises:
            ValueError: if the shapes are not of that form, or B and D differ.
        """
        _check_ddf(ddf_fixed_to_moving, "ddf_fixed_to_moving", "GradICONLoss", (2, 3))
        _check_ddf(ddf_moving_to_fixed, "ddf_moving_to_fixed", "GradICONLoss", (2, 3))
        if ddf_fixed_to_moving.shape[:2] != ddf_moving_to_fixed.shape[:2]:
            raise ValueError(
                "GradICONLoss expects two ddfs with the same batch size and number of axes, "
                f"got {list(ddf_fixed_to_moving.shape)} and {list(ddf_moving_to_fixed.shape)}."
            )
        back, there = full_precision(ddf_fixed_to_moving), full_precision(ddf_moving_to_fixed)
        points = self._points(there)
        points = points.expand(there.shape[0], *points.shape[1:])

        def error(at: torch.Tensor) -> torch.Tensor:
            to_fixed = warp(there, at)
            return to_fixed + warp(back, at + to_fixed)

        base = error(points)
        total = torch.zeros((), dtype=base.dtype, device=base.device)
        for axis in range(there.dim() - 2):
            ahead = points.clone()
            ahead[:, axis] += self.step
            total = total + ((error(ahead) - base) / self.step).square().mean()
        return total


class CorrespondenceLoss(_Loss):
    """Measure how far from their true partners points were brought, where those are known.

    Both images carry, in each voxel, the place of the point it shows in a frame they share, and whether that is known,
    as `RandDeformd` says it: where the moved places `p` are those of the fixed image `q`, the answer is right. The mean
    over the known voxels of `sqrt(|p - q|^2 + 1) - 1`: squares for small errors, distances for large ones.

    Example:
        >>> places = torch.cat([torch.zeros(1, 3, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)], dim=1)
        >>> off_by = torch.tensor([0.0, 3**0.5, 0.0, 0.0]).reshape(1, 4, 1, 1, 1)
        >>> round(CorrespondenceLoss()(places + off_by, places).item(), 5)
        1.0
    """

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare places.

        Args:
            pred: `(B, D + 1, *spatial)`, moved: places in voxels, then a channel that is not used.
            target: the same of the fixed image; its last channel weighs the voxels, 0 where nothing is known.

        Returns:
            scalar, voxels; 0 if nothing is known.

        Raises:
            ValueError: if the shapes are not of that form.
        """
        if pred.shape != target.shape or pred.shape[1] != pred.dim() - 1:
            raise ValueError(
                "CorrespondenceLoss expects two (B, D + 1, *spatial) of one shape with D spatial axes, got "
                f"{list(pred.shape)} and {list(target.shape)}."
            )
        squares = (full_precision(pred) - full_precision(target))[:, :-1].square().sum(dim=1)
        weight = full_precision(target)[:, -1]
        return (((squares + 1).sqrt() - 1) * weight).sum() / weight.sum().clamp(min=1e-6)


class LabeledSimilarity(_Loss):
    """Compare images and, beside them, the segmentations they carry as further channels.

    `images(image channels) + weight * labels(label channels)`. Labels serve training alone: nobody has to draw them for
    a pair that is registered.

    Args:
        images: any MONAI loss or callable `f(pred, target)` of the images, for example `LocalCorrelationLoss()`.
        labels: the same of the segmentations, for example MONAI's `DiceLoss()`.
        weight: factor of the latter.
        image_channels: how many channels are the image's; all after them are labels.
        unused_channels: how many channels before them are not compared.

    Raises:
        ValueError: for fewer than one image channel; when called, if no channels are left for labels.

    Example:
        >>> both = LabeledSimilarity(torch.nn.MSELoss(), torch.nn.L1Loss(), weight=2.0)
        >>> both(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item()
        3.0
    """

    def __init__(
        self,
        images: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        labels: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        weight: float = 1.0,
        image_channels: int = 1,
        unused_channels: int = 0,
    ) -> None:
        super().__init__()
        if image_channels < 1 or unused_channels < 0:
            raise ValueError(
                f"expected at least 1 image channel and 0 unused ones, got {image_channels} and {unused_channels}."
            )
        self.images, self.labels, self.weight = images, labels, weight
        self.image_channels, self.unused_channels = image_channels, unused_channels

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare what was moved with what it should be.

        Args:
            pred: `(B, C, *spatial)`, unused channels, the image's, then one per label.
            target: the same of the other image.

        Returns:
            scalar.

        Raises:
            ValueError: if the shapes differ, or there are no label channels.
        """
        before = self.unused_channels + self.image_channels
        if pred.shape != target.shape or pred.dim() < 3 or pred.shape[1] <= before:
            raise ValueError(
                f"LabeledSimilarity expects two (B, C, *spatial) of one shape with more than {before} channels, "
                f"got {list(pred.shape)} and {list(target.shape)}."
            )
        sizes = [self.unused_channels, self.image_channels, pred.shape[1] - before]
        (_, image, label), (_, other, other_label) = pred.split(sizes, dim=1), target.split(sizes, dim=1)
        return self.images(image, other) + self.weight * self.labels(label, other_label)


class RegistrationLoss(_Loss):
    """Join similarity, regularity and inverse consistency into the loss of a pair network.

    `sum of similarity(moved, target) + regularity_weight * mean of regularity(ddf) + consistency_weight *
    consistency(ddf_fixed_to_moving, ddf_moving_to_fixed)`, over the one or two directions in the prediction.
    A term with weight 0 is not computed.

    Args:
        similarity: any MONAI loss or callable `f(pred, target)`, for example `LocalCorrelationLoss()`.
        regularity: callable of one ddf, for example `DiffusionLoss()` or MONAI's `BendingEnergyLoss()`.
        regularity_weight: factor of the regularity, which is averaged over the directions.
        consistency: callable of both ddfs, for example `GradICONLoss()`; used only when there are two directions.
        consistency_weight: factor of the consistency.

    Example:
        >>> loss = RegistrationLoss(torch.nn.MSELoss(), DiffusionLoss())
        >>> pair = torch.ones(1, 2, 8, 8)
        >>> pred = torch.cat([torch.zeros(1, 2, 8, 8), pair[:, :1]], dim=1)
        >>> loss(pred, pair).item()
        0.0
    """

    def __init__(
        self,
        similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        regularity: Callable[[torch.Tensor], torch.Tensor] | None = None,
        regularity_weight: float = 1.0,
        consistency: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        consistency_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.similarity = similarity
        self.regularity = regularity
        self.regularity_weight = regularity_weight
        self.consistency = consistency
        self.consistency_weight = consistency_weight

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Score the answer of a pair network.

        Args:
            pred: `(B, D + C, *spatial)`: the ddf in voxels, then the moved image, compared with the fixed one; or
                `(B, 2 (D + C), *spatial)`: the same, then ddf from moving to fixed and the fixed image warped by it,
                compared with the moving one.
            label: `(B, 2 C, *spatial)`: the stacked pair, moving channels first, then fixed.

        Returns:
            scalar.

        Raises:
            ValueError: if the shapes are not of that form.
        """
        dims = label.dim() - 2
        channels = label.shape[1] // 2 if dims > 0 else 0
        two_way = pred.dim() > 1 and pred.shape[1] == 2 * (dims + channels)
        expected = (2 if two_way else 1) * (dims + channels)
        if channels == 0 or label.shape[1] % 2 or pred.shape != (label.shape[0], expected, *label.shape[2:]):
            raise ValueError(
                "RegistrationLoss expects label (B, 2 C, *spatial) and pred (B, D + C, *spatial) or "
                f"(B, 2 (D + C), *spatial) with D spatial axes, got {list(label.shape)} and {list(pred.shape)}."
            )
        moving, fixed = convert_to_tensor(label, track_meta=False).split(channels, dim=1)
        parts = convert_to_tensor(pred, track_meta=False).split([dims, channels] * (2 if two_way else 1), dim=1)
        ddfs, moved = parts[0::2], parts[1::2]
        total = self.similarity(moved[0], fixed)
        if two_way:
            total = total + self.similarity(moved[1], moving)
        if self.regularity is not None and self.regularity_weight != 0:
            total = total + self.regularity_weight * torch.stack([self.regularity(ddf) for ddf in ddfs]).mean()
        if self.consistency is not None and self.consistency_weight != 0 and two_way:
            total = total + self.consistency_weight * self.consistency(ddfs[0], ddfs[1])
        return total
