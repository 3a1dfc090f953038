"""The affine map in what a network answers: a registration that errors of single voxels do not reach."""

from typing import List, Sequence, Tuple

import torch
from torch import nn

from ..fields import full_precision, identity_grid, warp
from .active import box_mask, content_box, field_of_view, has_content, is_count, keep_if_content
from .combinators import Downsample, both, both_of_each
from .rotation import turn, turn_matrix

__all__ = ["AffineFit", "affine_ddf", "fit_affine", "halfway", "unexplained"]


def affine_ddf(matrix: torch.Tensor, shape: List[int]) -> torch.Tensor:
    """Return the ddf of an affine map.

    Args:
        matrix: `(B, D + 1, D + 1)`, homogeneous, from voxel indices to voxel indices.
        shape: of the grid.

    Returns:
        `(B, D, *shape)`, voxels, of the matrix's type.

    Example:
        >>> affine_ddf(torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 3.0], [0.0, 0.0, 1.0]]]), [2, 2])[0, :, 1, 1].tolist()
        [2.0, 3.0]
    """
    dims = len(shape)
    at = identity_grid(shape, matrix.dtype, matrix.device)
    to = (matrix[:, :dims, :dims] @ at.flatten(2) + matrix[:, :dims, dims:]).reshape([-1, dims] + shape)
    return to - at


def fit_affine(ddf: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Fit an affine map to a ddf by least squares, reweighted so that few wrong voxels count little.

    Five passes with the weights `1 / (1 + r^2 / s^2)` of Cauchy's distribution, `r` the distance of a voxel's answer
    from the map and `s` its mean. Along an axis on which all voxels are equal there is nothing to fit, and the
    displacement is continued.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        weight: `(B, 1, *shape)`, 0 or more.

    Returns:
        `(B, D + 1, D + 1)`, float64, homogeneous, from voxel indices to voxel indices; the identity without a weight.

    Example:
        >>> fit_affine(torch.full((1, 2, 4, 5), 3.0), torch.ones(1, 1, 4, 5))[0, :2, 2].round(decimals=6).tolist()
        [3.0, 3.0]
    """
    dims = ddf.shape[1]
    at = identity_grid(list(ddf.shape[2:]), torch.float64, ddf.device).flatten(2)
    steps, known = ddf.double().flatten(2), weight.double().flatten(2)
    total = known.sum(dim=2, keepdim=True).clamp(min=1e-12)
    identity = torch.eye(dims, dtype=torch.float64, device=ddf.device)
    part = known / total
    slope, offset = torch.zeros_like(steps[:, :, :dims]), torch.zeros_like(steps[:, :, :1])
    for _ in range(5):
        center, step = (part * at).sum(dim=2, keepdim=True), (part * steps).sum(dim=2, keepdim=True)
        away = at - center
        spread = (part * away) @ away.transpose(1, 2) + 1e-6 * identity
        slope = torch.linalg.solve_ex(spread, away @ (part * (steps - step)).transpose(1, 2))[0].transpose(1, 2)
        offset = step - slope @ center
        error = (steps - slope @ at - offset).detach().square().sum(dim=1, keepdim=True)
        # An error of a thousandth of a voxel is none.
        scale = ((known * error.sqrt()).sum(dim=2, keepdim=True) / total).square().clamp(min=1e-6)
        part = known / (1 + error / scale)
        part = part / part.sum(dim=2, keepdim=True).clamp(min=1e-12)
    bottom = torch.zeros_like(offset[:, :1]).expand(-1, 1, dims)
    one = torch.ones_like(offset[:, :1])
    return torch.cat([torch.cat([identity + slope, offset], dim=2), torch.cat([bottom, one], dim=2)], dim=1)


def halfway(there: torch.Tensor, back: torch.Tensor, point: torch.Tensor, largest_change: float = 8.0) -> torch.Tensor:
    """Join a map and one that should be its inverse into one map, which follows both alike.

    `there (back there)^(-1/2)`: where the root exists, swapping the two inverts the answer. Attention that is not sure
    of itself answers nearer to the center, in both directions; that cancels.

    Args:
        there: `(B, D + 1, D + 1)`, homogeneous, from fixed to moving indices.
        back: the same from moving to fixed indices.
        point: `(B, D)`, fixed indices.
        largest_change: by what factor a map may change volumes.

    Returns:
        `(B, D + 1, D + 1)`, from fixed to moving indices; the translation of `point` in `there` where the root does not
        exist, or the map mirrors or changes volumes by more.

    Example:
        >>> shrinking = torch.diag(torch.tensor([0.5, 1.0]))[None]
        >>> halfway(shrinking, shrinking, torch.zeros(1, 1))[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _halfway(there, back, point, largest_change)[0]


def _halfway(
    there: torch.Tensor, back: torch.Tensor, point: torch.Tensor, largest_change: float = 8.0
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return what `halfway` returns, and whether it is more than a translation, `(B,)`."""
    product = back @ there
    identity = torch.eye(there.shape[1], dtype=there.dtype, device=there.device).expand_as(there)
    inverse = _inverse_root(product.detach())
    joined = there.detach() @ inverse
    volume = torch.linalg.det(joined[:, :-1, :-1])
    found = (inverse @ product.detach() @ inverse - identity).abs().flatten(1).amax(dim=1) < 1e-3
    fits = found & joined.isfinite().flatten(1).all(dim=1) & (volume * largest_change > 1) & (volume < largest_change)
    step = (there[:, :-1, :-1] - identity[:, :-1, :-1]) @ point.unsqueeze(2) + there[:, :-1, -1:]
    moved = torch.cat([identity[:, :, :-1], torch.cat([step, identity[:, -1:, -1:]], dim=1)], dim=2)
    # Once more, with gradients, for those that have a root: the others' would be NaN, also where they are not used.
    each = fits[:, None, None]
    there, product = torch.where(each, there, identity), torch.where(each, product, identity)
    return torch.where(each, there @ _inverse_root(product), moved), fits


def _inverse_root(product: torch.Tensor) -> torch.Tensor:
    """Return `product^(-1/2)`, `(B, D + 1, D + 1)`, or anything where there is none.

    Reference: Denman and Beavers, Applied Mathematics and Computation 2, 1976: the pair goes to the root and its
    inverse.
    """
    root, inverse = product, torch.eye(product.shape[1], dtype=product.dtype, device=product.device).expand_as(product)
    for _ in range(20):
        root, inverse = (
            (root + torch.linalg.inv_ex(inverse)[0]) / 2,
            (inverse + torch.linalg.inv_ex(root)[0]) / 2,
        )
    return inverse


def unexplained(ddf: torch.Tensor, weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return which share of the variance of the points that voxels are sent to a map does not explain.

    0 where the ddf is the map's, about 1 where it has nothing to do with it or sends all voxels to one point.

    Args:
        ddf: `(B, D, *shape)`, voxels.
        weight: `(B, 1, *shape)`, 0 or more.
        matrix: `(B, D + 1, D + 1)`, homogeneous, from voxel indices to voxel indices.

    Returns:
        `(B,)`, float64, without gradient.

    Example:
        >>> steps = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
        >>> double = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> unexplained(steps, torch.ones(1, 1, 4), double).round(decimals=3).tolist()
        [0.038]
    """
    steps, part = ddf.detach().double().flatten(2), weight.double().flatten(2)
    part = part / part.sum(dim=2, keepdim=True).clamp(min=1e-12)
    shape = list(ddf.shape[2:])
    to = steps + identity_grid(shape, torch.float64, ddf.device).flatten(2)
    away = to - (part * to).sum(dim=2, keepdim=True)
    miss = steps - affine_ddf(matrix.detach().double(), shape).flatten(2)
    # A thousandth of a square voxel: points that all fall together are explained by anything.
    return ((part * miss.square()).sum(dim=[1, 2]) + 1e-3) / ((part * away.square()).sum(dim=[1, 2]) + 1e-3)


# An image that a network is asked about, the share of content in its voxels, and the map to the image it was made of.
_Coarse = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _turned_back(shape: List[int], perm: List[int], signs: List[int], like: torch.Tensor) -> torch.Tensor:
    """Return the map from indices of a turned array to those of the array, of the type of `like`."""
    dims = len(shape)
    matrix = turn_matrix(perm, signs).to(like.device).t()
    half = torch.tensor([0.5 * (size - 1) for size in shape], dtype=torch.float64, device=like.device)
    offset = half - matrix @ half[perm]
    bottom = torch.eye(dims + 1, dtype=torch.float64, device=like.device)[dims:]
    return torch.cat([torch.cat([matrix, offset.unsqueeze(1)], dim=1), bottom]).to(like.dtype)


class AffineFit(nn.Module):
    """Register by the affine map that fits best what a network answers in both directions.

    A map has few numbers and every voxel of the content votes on them, so that it is right where attention is right on
    the average. In further rounds the moving image is moved onto the fixed grid by the map so far and the network asked
    again; then the two directions are no longer inverse to each other.

    With `turns`, and where the first round of the moving image as it is, or the last, explains too little (`enough`),
    the first round is asked once for each turn, of the moving image turned so. The four answers that an affine map
    explains best get a second round, and the best of these goes on: a network that finds images turned by up to some 60
    degrees, as far as any rotation is from one of the 24 of the grid, then finds them turned by any angle, if it knows
    images turned like the fixed one. When the moving image is turned by a member of a group of turns the answer turns
    with it: exactly between two images that get this search, and where one is found at once as far as the rounds
    converge. Where the search explains too little as well it may be the fixed image that is turned: then all is done
    once more with the two in each other's place, and where that explains enough its inverse is the answer.

    In training the answer is the network's own: every voxel of it gets its gradient, and turns and rounds are a search,
    in which no gradient chooses.

    An image may be cut (`field_of_view`) and show less than the other. If one alone is, the first round goes by its
    voxels, which have partners; in the further ones neither image shows what the other cannot. Then they have less to
    contradict a wrong map with: half of `enough` is needed to do without the search, whose map is taken only where it
    explains more, so that turns are not followed exactly.

    Where the network is equivariant to translations of either image, so is the fit. In further rounds that needs room:
    what is moved beyond the fixed canvas is lost. `RegistrationInferer` gives every pair the same.

    Args:
        net: a network called `net(moving, fixed)`. What `Downsample` wraps is asked and fitted at its low resolution.
        rounds: how often it is asked.
        turns: turns of the moving image to start from, see `rotation_group`; none is the image as it is.

    Raises:
        ValueError: if `rounds` is not an integer of at least 1.

    Example:
        >>> class Half(nn.Module):
        ...     def forward(self, moving, fixed):
        ...         return torch.full((1, 2, 4, 4), 0.5) * (1 if moving.mean() < fixed.mean() else -1)
        >>> AffineFit(Half())(torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0)).unique().tolist()
        [0.5]
    """

    __constants__ = ["candidates", "enough", "least_shown", "pooled"]
    candidates = 4  # starts that get a second round
    # Misfit above which nothing was found. On five pairs of brains it was 0.013 to 0.026 where the map was right and
    # 0.07 to 0.15 where it was wrong.
    enough = 0.04
    # Share of the smaller image that both must show: where a map brings less of two images together it proves little.
    least_shown = 0.25
    turns: List[List[List[int]]]

    def __init__(self, net: nn.Module, rounds: int = 1, turns: Sequence[Sequence[List[int]]] = ()) -> None:
        super().__init__()
        if not is_count(rounds, 1):
            raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}.")
        self.net = net
        self.rounds = rounds
        self.turns = [[list(perm), list(signs)] for perm, signs in turns]
        self.pooled = isinstance(net, Downsample)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Register a pair of images.

        Args:
            moving: `(B, C, *moving shape)`, background 0.
            fixed: `(B, C, *fixed shape)`, background 0.

        Returns:
            ddf `(B, D, *fixed shape)`, voxels: in training the network's, else of an affine map, and zero for a sample
            of which either image is empty.
        """
        if self.training:
            return self.net(moving, fixed)
        matrix, misfit = self._at_once(moving, fixed)
        cut = _is_cut(moving) | _is_cut(fixed)
        # Two images of which neither shows what the other cannot have less to contradict a wrong map with.
        lost = (misfit > torch.where(cut, 0.5 * self.enough, self.enough)) & has_content(moving) & has_content(fixed)
        if len(self.turns) > 1 and _any_or_traced(lost):
            turned, left = self._search(moving, fixed)
            better = lost & (~cut | (left < misfit))
            matrix = torch.where(better[:, None, None], turned, matrix)
            misfit = torch.where(better, left, misfit)
            lost = lost & (misfit > self.enough)
            if _any_or_traced(lost):
                back, other = self._search(fixed, moving)
                # Where neither finds anything each direction keeps its own answer: the two contradict each other.
                found = lost & (other <= self.enough) & (~cut | (other < 0.5 * misfit))
                matrix = torch.where(found[:, None, None], torch.linalg.inv_ex(back)[0], matrix)
        ddf = affine_ddf(matrix, list(fixed.shape[2:]))
        return keep_if_content(ddf.to(full_precision(fixed[:0]).dtype), moving, fixed)

    @torch.jit.unused
    def both(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Register in both directions; arguments and results as for the function `both`."""
        if self.training:
            return both(self.net, moving, fixed)
        return self(moving, fixed), self(fixed, moving)

    def _at_once(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the map of all rounds of the image as it is, `(B, D + 1, D + 1)`, and the first or last misfit."""
        cut, fixed_cut = _is_cut(moving), _is_cut(fixed)
        maps, misfits = self._fit([moving], fixed, cut & ~fixed_cut, fixed_cut & ~cut)
        matrix, misfit = self._go_on(maps, misfits, moving, fixed)
        # With what one image alone shows no map agrees in the first round.
        return matrix, torch.where(cut | fixed_cut, misfit, torch.maximum(misfit, misfits[0]))

    def _search(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the map of all rounds from the best turn, `(B, D + 1, D + 1)`, float64, and its misfit `(B,)`."""
        maps, misfits = self._starts(moving, fixed)
        return self._go_on(maps, misfits, moving, fixed)

    def _go_on(
        self, maps: torch.Tensor, misfits: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return what further rounds make of the first one's maps, `(B, D + 1, D + 1)`, float64, and its misfit."""
        shape = list(fixed.shape[2:])
        neither = torch.zeros_like(has_content(fixed))
        cut = _is_cut(moving) | _is_cut(fixed)
        any_cut = _any_or_traced(cut)
        for k in range(1, self.rounds):
            maps, misfits = _best(maps, misfits, self.candidates if k == 1 else 1)
            so_far = maps.unbind()
            moved = [self._moved(moving, matrix, shape) for matrix in so_far]
            if any_cut:
                parts = [_shown_by_both(one, moving, fixed, matrix) for one, matrix in zip(moved, so_far)]
                fits = [self._fit([one], other, neither, neither) for one, other, _ in parts]
                steps = torch.cat([step for step, _ in fits])
                lost = torch.stack([cut & (share < self.least_shown) for _, _, share in parts])
                misfits = torch.cat([error for _, error in fits]) + 2.0 * lost.to(misfits.dtype)
            else:
                steps, misfits = self._fit(moved, fixed, neither, neither)
            maps = torch.stack([matrix @ step for matrix, step in zip(so_far, steps.unbind())])
        maps, misfits = _best(maps, misfits, 1)
        return maps[0], misfits[0]

    def _starts(self, moving: torch.Tensor, fixed: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the maps of a first round for each turn, `(N, B, D + 1, D + 1)`, float64, and misfits `(N, B)`."""
        turned = [turn(moving, perm, signs) for perm, signs in self.turns]
        cut, fixed_cut = _is_cut(moving), _is_cut(fixed)
        maps, misfits = self._fit(turned, fixed, cut & ~fixed_cut, fixed_cut & ~cut)
        shape = list(moving.shape[2:])
        back = [_turned_back(shape, perm, signs, maps).unsqueeze(0) for perm, signs in self.turns]
        return torch.stack(back) @ maps, misfits

    def _fit(
        self, movings: List[torch.Tensor], fixed: torch.Tensor, by_moving: torch.Tensor, by_fixed: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the maps of one round, `(N, B, D + 1, D + 1)`, float64, and their misfits `(N, B)`.

        `by_moving` and `by_fixed`, `(B,)`, tell whose voxels alone have partners in the other.
        """
        here = self._coarse(fixed)
        coarse = [self._coarse(moving) for moving in movings]
        answers = self._answers([image for image, _, _ in coarse], here[0])
        first, last = content_box(fixed)
        point = (first + last).double() / 2
        fits = [_joined(answer, there, here, point, by_moving, by_fixed) for answer, there in zip(answers, coarse)]
        return torch.stack([matrix for matrix, _ in fits]), torch.stack([misfit for _, misfit in fits])

    def _coarse(self, image: torch.Tensor) -> _Coarse:
        """Return the image that is asked about, the share of content in its voxels, and the map to the image given."""
        if self.pooled:
            pooled, to_fine = self.net.coarse(image)  # type: ignore[operator]
            share, _ = self.net.coarse(_content(image).to(image.dtype))  # type: ignore[operator]
            return pooled, share, to_fine
        else:
            dims = image.dim() - 2
            same = torch.eye(dims + 1, dtype=torch.float64, device=image.device).repeat(image.shape[0], 1, 1)
            return image, _content(image), same

    def _answers(self, movings: List[torch.Tensor], fixed: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """Ask the network in both directions."""
        if not torch.jit.is_scripting():
            return both_of_each(self.net.net if self.pooled else self.net, movings, fixed)  # type: ignore[arg-type]
        elif self.pooled:
            return [(self.net.net(one, fixed), self.net.net(fixed, one)) for one in movings]  # type: ignore[operator]
        else:
            return [(self.net(moving, fixed), self.net(fixed, moving)) for moving in movings]

    def _moved(self, moving: torch.Tensor, matrix: torch.Tensor, shape: List[int]) -> torch.Tensor:
        """Return the moving image on the fixed grid, and what is content there."""
        ddf = affine_ddf(matrix, shape).to(full_precision(moving[:0]).dtype)
        # Displacements by halves and quarters of a voxel are common: at their values rounding would decide.
        inside = warp(_content(moving).to(moving.dtype), ddf, mode="linear", padding="zeros") > 0.4
        return warp(moving, ddf, mode="linear", padding="zeros") * inside


def _any_or_traced(each: torch.Tensor) -> bool:
    """Return whether any is true; while a graph is traced, which cannot branch, always true."""
    if torch.jit.is_scripting():
        return bool(each.any())
    else:  # TorchScript does not compile this branch
        return torch.jit.is_tracing() or torch.compiler.is_compiling() or bool(each.any())


def _content(image: torch.Tensor) -> torch.Tensor:
    """Return where an image has content, `(B, 1, *shape)`, boolean."""
    return (image != 0).any(dim=1, keepdim=True)


def _is_cut(image: torch.Tensor) -> torch.Tensor:
    """Tell for each sample whether an image may show less than there is, `(B,)`."""
    first, last = field_of_view(image)
    return (first.isfinite() | last.isfinite()).any(dim=1)


def _shown_by_both(
    moved: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, matrix: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty both images where a map says that the other is cut.

    Returns:
        The moved and the fixed image `(B, C, *fixed shape)`, and the least share of the smaller of the images that is
        left in either, `(B,)`.
    """
    shape, view, fixed_view = list(fixed.shape[2:]), field_of_view(moving), field_of_view(fixed)
    inside = torch.ones_like(_content(fixed))
    at = identity_grid(shape, matrix.dtype, matrix.device)
    for k in range(len(shape)):
        row = matrix[:, k].reshape([-1, len(shape) + 1] + [1] * len(shape))
        to = (row[:, :-1] * at).sum(dim=1, keepdim=True) + row[:, -1:]
        first, last = (side[:, k].reshape([-1, 1] + [1] * len(shape)) for side in view)
        # At displacements by halves of a voxel, which are common, rounding would decide: as far as content is moved.
        inside = inside & (to > first - 0.6) & (to < last + 0.6)
    moved, part = moved * box_mask(fixed_view[0], fixed_view[1], shape), fixed * inside
    sizes = [_content(image).flatten(1).sum(dim=1).double() for image in (moved, part, moving, fixed)]
    return moved, part, torch.minimum(sizes[0], sizes[1]) / torch.minimum(sizes[2], sizes[3]).clamp(min=1.0)


def _joined(
    answer: Tuple[torch.Tensor, torch.Tensor],
    moving: _Coarse,
    fixed: _Coarse,
    point: torch.Tensor,
    by_moving: torch.Tensor,
    by_fixed: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the map that joins what two directions answered, `(B, D + 1, D + 1)`, and how badly maps fit them.

    Where the voxels of one image alone have partners their direction speaks for both, unless it has no inverse.
    """
    (ddf, back), (_, share, to_moving), (_, fixed_share, to_fixed) = answer, moving, fixed
    there, again = fit_affine(ddf, fixed_share), fit_affine(back, share)
    misfit, misfit_back = unexplained(ddf, fixed_share, there), unexplained(back, share, again)
    misfit, misfit_back = torch.where(by_moving, misfit_back, misfit), torch.where(by_fixed, misfit, misfit_back)
    there, again = _instead(there, again, by_moving), _instead(again, there, by_fixed)
    from_moving, from_fixed = torch.linalg.inv(to_moving), torch.linalg.inv(to_fixed)
    matrix, fits = _halfway(to_moving @ there @ from_fixed, to_fixed @ again @ from_moving, point)
    # Maps that cannot be joined, and content that was lost on the way, are worse than any that explain anything.
    fits = fits & (share > 0).flatten(1).any(dim=1) & (fixed_share > 0).flatten(1).any(dim=1)
    return matrix, misfit + misfit_back + 2.0 * (~fits).to(misfit.dtype)


def _instead(matrix: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return maps, `(B, D + 1, D + 1)`, and of some samples the inverse of another, if it changes volumes sensibly."""
    volume = torch.linalg.det(other[:, :-1, :-1])
    where = (where & (volume > 0.125) & (volume < 8.0))[:, None, None]
    identity = torch.eye(other.shape[1], dtype=other.dtype, device=other.device).expand_as(other)
    return torch.where(where, torch.linalg.inv_ex(torch.where(where, other, identity))[0], matrix)


def _best(maps: torch.Tensor, misfits: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Keep the maps of each sample that fit best, `(N, B, D + 1, D + 1)` and `(N, B)`, best first."""
    found = torch.topk(misfits, min(count, misfits.shape[0]), dim=0, largest=False)
    index = found.indices.unsqueeze(2).unsqueeze(3).expand(-1, -1, maps.shape[2], maps.shape[3])
    return maps.gather(0, index), found.values
