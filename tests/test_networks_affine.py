"""The affine stage: known maps found again, wrong voxels outvoted, directions joined, and translations followed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers_networks import SMALL, content, place, randomized, vector
from scipy.spatial.transform import Rotation
from torch import nn

from equireg.fields import identity_grid, warp
from equireg.inferer import RegistrationInferer
from equireg.networks import CARL, AffineFit, CoordinateAttention, Downsample, PairNetwork
from equireg.networks.active import content_box
from equireg.networks.affine import _is_cut, affine_ddf, fit_affine, halfway, unexplained
from equireg.networks.combinators import both_of_each
from equireg.networks.rotation import rotation_group, turn, turn_matrix

SHAPES = {2: (9, 14), 3: (7, 9, 12)}


def matrix(dims: int, seed: int = 0, size: float = 0.15, shift: float = 3.0) -> torch.Tensor:
    """Return a random homogeneous map of indices, `(2, D + 1, D + 1)`, not far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.eye(dims + 1, dtype=torch.float64).repeat(2, 1, 1)
    maps[:, :dims, :dims] += size * torch.randn(2, dims, dims, generator=generator, dtype=torch.float64)
    maps[:, :dims, dims] = shift * torch.randn(2, dims, generator=generator, dtype=torch.float64)
    return maps


def turn_2d(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[[c, -s, 4.0], [s, c, -2.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
def test_ddf_of_a_map_and_map_of_a_ddf(dims: int) -> None:
    maps, shape = matrix(dims), list(SHAPES[dims])
    ddf = affine_ddf(maps, shape)
    corner = torch.tensor([n - 1.0 for n in shape] + [1.0], dtype=torch.float64)
    last = (slice(None), slice(None), *[-1] * dims)
    assert torch.allclose(ddf[last], ((maps @ corner) - corner)[:, :dims])
    assert (fit_affine(ddf, torch.ones(2, 1, *shape)) - maps).abs().max() < 1e-5  # 1e-6 voxel^2 keep it solvable
    assert fit_affine(ddf.float(), torch.ones(2, 1, *shape)).dtype == torch.float64


@pytest.mark.parametrize("dims", [2, 3])
def test_wrong_voxels_are_outvoted_and_those_without_weight_have_no_vote(dims: int) -> None:
    maps, shape = matrix(dims), [2 * n for n in SHAPES[dims]]
    ddf = affine_ddf(maps, shape)
    generator = torch.Generator().manual_seed(1)
    weight = (torch.rand(2, 1, *shape, generator=generator) > 0.3).double()
    ddf = torch.where(weight > 0, ddf, torch.full_like(ddf, 1e3))
    assert (fit_affine(ddf, weight) - maps).abs().max() < 1e-5
    wrong = torch.rand(2, 1, *shape, generator=generator) < 0.1
    fitted = fit_affine(torch.where(wrong & (weight > 0), ddf + 10.0, ddf), weight)
    assert (affine_ddf(fitted, shape) - affine_ddf(maps, shape)).abs().max() < 0.1  # plain least squares: 1.0


def test_nothing_to_fit() -> None:
    ddf = affine_ddf(matrix(2), [6, 5])
    assert torch.equal(fit_affine(ddf, torch.zeros(2, 1, 6, 5)), torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    line = torch.zeros(2, 1, 6, 5)
    line[:, :, 3] = 1.0  # along the first axis, all content has one place
    fitted = fit_affine(ddf, line)
    assert torch.allclose(affine_ddf(fitted, [6, 5])[:, :, 3], ddf[:, :, 3], atol=1e-4)
    assert torch.allclose(fitted[:, :2, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dims", [2, 3])
def test_halfway_cancels_shrinking_and_swapping_inverts(dims: int) -> None:
    there, origin = matrix(dims), torch.zeros(2, dims, dtype=torch.float64)
    assert (halfway(there, torch.linalg.inv(there), origin) - there).abs().max() < 1e-9
    shrink = torch.diag(torch.tensor([0.6] * dims + [1.0], dtype=torch.float64)).expand(2, -1, -1)
    assert (halfway(there @ shrink, shrink @ torch.linalg.inv(there), origin) - there).abs().max() < 1e-9
    other = torch.linalg.inv(matrix(dims, seed=3))
    assert (halfway(there, other, origin) @ halfway(other, there, origin) - torch.eye(dims + 1)).abs().max() < 1e-9


def test_halfway_keeps_turns_by_any_angle() -> None:
    for degrees in range(0, 360, 30):
        turn = turn_2d(degrees)
        assert (halfway(turn, torch.linalg.inv(turn), torch.zeros(1, 2).double()) - turn).abs().max() < 1e-9


@pytest.mark.parametrize("slope", [0.0, -1.0, 0.1], ids=["to one point", "mirrored", "a hundredth"])
def test_halfway_falls_back_to_a_translation_of_the_point(slope: float) -> None:
    there = torch.tensor([[[slope, 0.0, 7.0], [0.0, abs(slope), 2.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    back = torch.linalg.inv(there) if slope else there
    found = halfway(there, back, torch.tensor([[10.0, 4.0]], dtype=torch.float64))
    expected = [[1.0, 0.0, slope * 10 + 7 - 10], [0.0, 1.0, abs(slope) * 4 + 2 - 4], [0.0, 0.0, 1.0]]
    assert torch.allclose(found[0], torch.tensor(expected, dtype=torch.float64))


class Blobs(nn.Module):
    """Match what moments of the images say, and go `share` of the way: translations, and scale along each axis."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        def moments(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            at = identity_grid(list(image.shape[2:]), image.dtype).flatten(2)
            mass = image.flatten(2) / image.sum()
            center = (mass * at).sum(2, keepdim=True)
            return center, (mass * (at - center).square()).sum(2, keepdim=True).sqrt()

        (center, width), (fixed_center, fixed_width) = moments(moving), moments(fixed)
        at = identity_grid(list(fixed.shape[2:]), fixed.dtype)
        to = center + (at.flatten(2) - fixed_center) * width / fixed_width
        return self.share * (to.reshape(at.shape) - at)


def blob(shape: tuple[int, int], center: tuple[float, float], width: tuple[float, float]) -> torch.Tensor:
    at = identity_grid(list(shape), torch.float64)
    squares = sum(((at[:, k] - c) / w).square() for k, (c, w) in enumerate(zip(center, width)))
    return torch.where(squares < 9, torch.exp(-squares / 2), 0.0).unsqueeze(1)


def test_rounds_go_on_where_the_network_stops_short() -> None:
    fixed, moving = blob((40, 44), (20, 22), (4, 4)), blob((50, 40), (27, 17), (6, 3))
    misses = []
    for rounds in (1, 2, 4):
        with torch.no_grad():
            ddf = AffineFit(Blobs(0.7), rounds).eval()(moving, fixed)
        misses.append((warp(moving, ddf, padding="zeros") - fixed).abs().max().item())
    assert misses[0] > 0.1 and misses[0] > 2 * misses[1] > 4 * misses[2] and misses[2] < 0.05


def test_training_takes_the_answer_of_the_network() -> None:
    fixed, moving = blob((40, 44), (20, 22), (4, 4)), blob((50, 40), (27, 17), (6, 3))
    net = Blobs(0.7)
    whole = AffineFit(net, 4, rotation_group(2, "grid")).train()
    assert torch.equal(whole(moving, fixed), net(moving, fixed))
    assert all(torch.equal(a, b) for a, b in zip(whole.both(moving, fixed), (net(moving, fixed), net(fixed, moving))))
    assert (whole.eval()(moving, fixed) - net(moving, fixed)).abs().max() > 0.1
    there, back = whole.both(moving, fixed)
    assert torch.equal(there, whole(moving, fixed)) and torch.equal(back, whole(fixed, moving))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_random_networks_follow_whole_voxel_moves_of_either_image(dims: int, rounds: int) -> None:
    net = randomized(CARL(dims, nesting="attention", factor=2, affine_rounds=rounds, **SMALL), torch.float64)
    infer, pair_net = RegistrationInferer(), PairNetwork(net).eval()
    moving, fixed = (content(*size, seed=k, dtype=torch.float64) for k, size in enumerate([(13, 10, 9), (12, 11, 8)]))
    moving, fixed = (image[(..., *[0] * (3 - dims))] if dims < 3 else image for image in (moving, fixed))
    fixed_at, canvas = (2, 1, 3)[:dims], (18, 17, 16)[:dims]
    with torch.no_grad():
        old = infer(place(moving, canvas, (3, 4, 5)[:dims]), pair_net, fixed=place(fixed, canvas, fixed_at))
        new = infer(
            place(moving, (25, 30, 21)[:dims], (8, 11, 6)[:dims]), pair_net, fixed=place(fixed, canvas, fixed_at)
        )
        wide = infer(
            place(moving, canvas, (3, 4, 5)[:dims]), pair_net, fixed=place(fixed, (26, 22, 20)[:dims], (5, 1, 7)[:dims])
        )
    by = vector((5, 7, 1)[:dims], old)
    assert (new[:, :dims] - old[:, :dims] - by).abs().max() < 1e-8
    inner = tuple(slice(first, first + size) for first, size in zip((5, 1, 7), fixed.shape[2:]))
    there = tuple(slice(first, first + size) for first, size in zip(fixed_at, fixed.shape[2:]))
    shifted = wide[:, :dims][(..., *inner)] + vector((3, 0, 4)[:dims], old)
    assert (shifted - old[:, :dims][(..., *there)]).abs().max() < 1e-8
    assert old[:, :dims].flatten(2).std(dim=2).min() > 0.01  # no translation, which any network would follow


class Dots(nn.Module):
    """Find dots of equal value again if they lie in a similar direction from the center; answer the center else."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.least = math.cos(math.radians(degrees))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        at, here = ((image[0, 0] != 0).nonzero().double() for image in (moving, fixed))
        center, fixed_center = at.mean(dim=0), here.mean(dim=0)
        ddf = torch.zeros(1, fixed.dim() - 2, *fixed.shape[2:], dtype=torch.float64)
        for dot in here:
            alike = torch.cosine_similarity(at - center, (dot - fixed_center).unsqueeze(0)) > self.least
            same = alike & (moving[(0, 0, *at.long().T)] == fixed[(0, 0, *dot.long())])
            to = at[same].mean(dim=0) if same.any() else center
            ddf[(0, slice(None), *dot.long())] = to - dot
        return ddf


class UsualDots(Dots):
    """Find dots of equal value again that lie in a similar direction as usual in both images."""

    def __init__(self, degrees: float, usual: torch.Tensor) -> None:
        super().__init__(degrees)
        self.usual = usual

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        known = []
        for image in (moving, fixed):
            at = (image[0, 0] != 0).nonzero()
            values = image[(0, 0, *at.T)].round().long() - 1
            alike = torch.cosine_similarity(at - at.double().mean(dim=0), self.usual[values]) > self.least
            known.append(
                torch.zeros_like(image).index_put((torch.tensor(0), torch.tensor(0), *at[alike].T), image.new_ones(1))
            )
        center = (moving[0, 0] != 0).nonzero().double().mean(dim=0)
        ddf = torch.zeros(1, fixed.dim() - 2, *fixed.shape[2:], dtype=torch.float64)
        for dot in (fixed[0, 0] != 0).nonzero():
            same = (moving == fixed[(0, 0, *dot)]) & (known[0] > 0)
            found = bool(same.any()) and known[1][(0, 0, *dot)] > 0
            to = same[0, 0].nonzero()[0].double() if found else center
            ddf[(0, slice(None), *dot)] = to - dot
        return ddf


def dots(places: torch.Tensor, side: int) -> torch.Tensor:
    """Return an image `(1, 1, *[side] * D)` with the values 1, 2, ... at places around its center."""
    image = torch.zeros(1, 1, *[side] * places.shape[1], dtype=torch.float64)
    image[(0, 0, *(places.round().long() + side // 2).T)] = torch.arange(1.0, len(places) + 1, dtype=torch.float64)
    return image


@pytest.mark.parametrize("dims", [2, 3])
def test_starts_from_turns_find_what_a_network_finds_turned_a_little(dims: int) -> None:
    places = 8 * torch.randn(9, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tanh()
    fixed, turns = dots(places, 25), rotation_group(dims, "grid")
    generator = torch.Generator().manual_seed(2)
    lost = 0
    for _ in range(8):
        rotation = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))[0]
        rotation[:, 0] *= torch.linalg.det(rotation)
        moving = dots(places @ rotation.T, 37)
        errors = []
        for starts in (turns, ()):
            ddf = AffineFit(Dots(50.0 if dims == 2 else 70.0), 1, starts).eval()(moving, fixed)
            found = (ddf + identity_grid([25] * dims, torch.float64))[
                (0, slice(None), *(places.round().long() + 12).T)
            ].T
            errors.append((found - 18 - places @ rotation.T).norm(dim=1).max().item())
        assert errors[0] < 2.5, "dots lie on whole voxels, 0.9 from where they should"
        lost += errors[1] > 5
    assert lost >= 3, "otherwise the starts prove nothing"


@pytest.mark.parametrize("dims", [2, 3])
def test_a_fixed_image_that_is_turned_is_found_the_other_way_round(dims: int) -> None:
    places = 8 * torch.randn(9, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tanh()
    axis = np.array([0.48, 0.6, 0.64]) if dims == 3 else np.array([0.0, 0.0, 1.0])
    fit = AffineFit(UsualDots(50.0 if dims == 2 else 66.0, places), 1, rotation_group(dims, "grid")).eval()
    one_way = copy.copy(fit)
    one_way.enough, fit.enough = math.inf, 0.3  # dots lie on whole voxels: what is right leaves more than brains do
    lost = 0
    for degrees in (110, 150, 180):
        rotation = torch.from_numpy(Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix()[:dims, :dims])
        moving, fixed, here = dots(places, 25), dots(places @ rotation.T, 37), places @ rotation.T
        errors = []
        for net in (fit, one_way):
            to = net(moving, fixed) + identity_grid([37] * dims, torch.float64)
            errors.append(
                (to[(0, slice(None), *(here.round().long() + 18).T)].T - 12 - places).norm(dim=1).max().item()
            )
        assert errors[0] < 2.5
        lost += errors[1] > 5
    assert lost >= 2, "otherwise the other way round proves nothing"


def test_each_sample_takes_the_way_that_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at once; by the search; the other way round; lost both ways; and an empty image, nobody asks again."""
    images = torch.rand(5, 1, 6, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    moving, fixed = images.clone(), images.flip(2)
    moving[4] = 0
    first, there, back = (torch.cat([matrix(2, seed + k) for k in range(3)])[:5] for seed in (0, 3, 6))
    answers = [(there, torch.tensor([0.0, 0.01, 0.08, 0.08, 2.0])), (back, torch.tensor([0.0, 0.0, 0.03, 0.05, 2.0]))]
    monkeypatch.setattr("equireg.networks.affine._is_cut", lambda image: torch.zeros(len(image), dtype=torch.bool))
    monkeypatch.setattr(AffineFit, "_at_once", lambda _, m, f: (first[-len(m) :], misfits[-len(m) :]))
    monkeypatch.setattr(AffineFit, "_search", lambda *_: answers.pop(0))
    misfits = torch.tensor([0.01, 0.05, 0.08, 0.08, 2.0])
    fit = AffineFit(Blobs(0.7), 2, rotation_group(2, "pi")).eval()
    expected = affine_ddf(torch.stack([first[0], there[1], torch.linalg.inv(back[2]), there[3], first[4]]), [6, 7])
    expected[4] = 0
    assert torch.allclose(fit(moving, fixed), expected.float(), atol=1e-5) and not answers
    assert not fit(moving[4:], fixed[4:]).any()  # and asks no search


def test_what_is_found_in_images_that_are_cut_must_be_clearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at once; by a search; not better by a search; better the other way round; and better, but not by enough."""
    images = content(6, 7, batch=5)
    assert _is_cut(images).all()
    first, there, back = (torch.cat([matrix(2, seed + k) for k in range(3)])[:5] for seed in (0, 3, 6))
    answers = [
        (there, torch.tensor([0.01, 0.025, 0.031, 0.09, 0.06])),
        (back, torch.tensor([0.0, 0.0, 0.0, 0.03, 0.03])),
    ]
    monkeypatch.setattr(AffineFit, "_at_once", lambda *_: (first, torch.tensor([0.019, 0.03, 0.03, 0.08, 0.05])))
    monkeypatch.setattr(AffineFit, "_search", lambda *_: answers.pop(0))
    expected = affine_ddf(torch.stack([first[0], there[1], first[2], torch.linalg.inv(back[3]), first[4]]), [6, 7])
    ddf = AffineFit(Blobs(0.7), 2, rotation_group(2, "pi")).eval()(images, images)
    assert torch.allclose(ddf, expected.float(), atol=1e-5) and not answers


def test_images_that_lie_alike_are_asked_about_once_a_round() -> None:
    """The turns cost nothing where they are not needed, and change nothing."""
    moving, fixed = blob((31, 40), (14, 20), (3, 5)), blob((31, 40), (16, 17), (4, 4))
    asked: list[torch.Size] = []
    net = Blobs(0.7)
    net.register_forward_hook(lambda _, images, __: asked.append(images[0].shape))
    answers = [
        AffineFit(net, 3, turns).eval()(moving, fixed)
        for turns in (rotation_group(2, "none"), rotation_group(2, "grid"))
    ]
    assert torch.equal(*answers) and len(asked) == 2 * 2 * 3


def spindle(size: Sequence[int]) -> torch.Tensor:
    """Return a mask, `(1, 1, *size)`, that touches each side of its box in few voxels."""
    half = torch.tensor([(n - 1) / 2 for n in size], dtype=torch.float64).reshape(-1, *[1] * len(size))
    away = (identity_grid(list(size), torch.float64)[0] - half).abs() / (half + 0.25)
    return (away.sum(dim=0) <= 1.25)[None, None]


@pytest.mark.parametrize("dims", [2, 3])
def test_answers_follow_turns_of_the_moving_image(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AffineFit, "enough", 0.0)  # nothing is found at once
    net = randomized(CARL(dims, nesting="attention", factor=2, affine_rounds=3, affine_turns="grid", **SMALL))
    net, infer = net.double(), RegistrationInferer()
    moving, fixed = (
        content(*size[:dims], seed=k, dtype=torch.float64) * spindle(size[:dims])
        for k, size in enumerate([(13, 11, 9), (12, 11, 8)])
    )
    assert not _is_cut(moving) and not _is_cut(fixed)
    turns = rotation_group(dims, "grid")
    canvas = [16] * dims
    with torch.no_grad():
        old = infer(place(moving, canvas, (2, 3, 4)[:dims]), PairNetwork(net).eval(), fixed=fixed)[:, :dims]
        points = old + identity_grid(list(fixed.shape[2:]), torch.float64) - 7.5
        for perm, signs in turns[:: 1 if dims == 2 else 7]:
            turned = turn(place(moving, canvas, (2, 3, 4)[:dims]), perm, signs)
            new = infer(turned, PairNetwork(net).eval(), fixed=fixed)[:, :dims]
            expected = torch.einsum("ij,bj...->bi...", turn_matrix(perm, signs), points)
            got = new + identity_grid(list(fixed.shape[2:]), torch.float64) - 7.5
            assert (got - expected).abs().max() < 1e-8
    assert old.flatten(2).std(dim=2).min() > 0.01


def test_unexplained_share() -> None:
    maps, shape = matrix(2), [9, 14]
    ddf, ones = affine_ddf(maps, shape), torch.ones(2, 1, 9, 14)
    assert unexplained(ddf, ones, maps).max() < 1e-4
    to_one_point = 3.0 - identity_grid(shape, torch.float64)
    assert unexplained(to_one_point, ones[:1], fit_affine(to_one_point, ones[:1])).item() == pytest.approx(
        1.0, abs=0.01
    )
    noise = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = (ddf + identity_grid(shape, torch.float64)).flatten(2)
    variance = points.var(dim=2, correction=0).sum(dim=1)
    share = unexplained(ddf + 2 * noise, ones, maps)
    assert torch.allclose(share, 8 / (variance + 8), rtol=0.15)
    assert unexplained(ddf, 0 * ones, maps).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("centered", [False, True])
def test_pooled_voxels_lie_where_the_map_says(centered: bool) -> None:
    image = place(content(11, 9, dtype=torch.float64), (23, 21), (5, 6))
    net = Downsample(nn.Identity(), 4, content_phase=True, centered=centered)
    # Where blocks lie wholly in the image, the mean of the coordinates of their voxels is that of their center.
    coordinates = identity_grid([23, 21], torch.float64)
    pooled, to_fine = net.coarse(image)
    mean = net._pool(coordinates, net._phase(image))
    at = affine_ddf(to_fine, list(pooled.shape[2:])) + identity_grid(list(pooled.shape[2:]), torch.float64)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert (at - mean)[inner].abs().max() < 1e-9 and mean[inner].numel() > 0


class Nearest(nn.Module):
    """Send every voxel to the one that shows most nearly the same: images show places in an object, and 1.

    As attention does, it answers the nearest that is left where a voxel's partner was cut off.
    """

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        at, here = ((image[0] != 0).any(dim=0).nonzero() for image in (moving, fixed))
        shows, shown = (image[0][(slice(None), *index.T)].T for image, index in ((moving, at), (fixed, here)))
        shows, shown = shows[:, :2] / shows[:, 2:], shown[:, :2] / shown[:, 2:]  # at borders both are mixed with 0
        ddf = torch.zeros(1, 2, *fixed.shape[2:], dtype=torch.float64)
        if len(at) and len(here):
            ddf[(0, slice(None), *here.T)] = (at[torch.cdist(shown, shows).argmin(dim=1)] - here).double().T
        return ddf


@pytest.mark.parametrize(
    ("cut", "rounds"),
    [*((cut, 4) for cut in ("neither", "moving", "fixed", "both", "both, differently")), ("moving", 1), ("fixed", 1)],
)
def test_an_image_that_is_cut_is_found_in_one_that_is_not(
    cut: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known map between images of which one shows a part of the other; without the field of view it is missed."""
    shape, center = [60, 66], torch.tensor([30.0, 31.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    true = torch.tensor([[[1.1, 0.2, -8.0], [-0.15, 0.95, 6.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    places = identity_grid(shape, torch.float64)
    radii = torch.tensor([20.0, 26.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    inside = ((places - center) / radii).square().sum(dim=1, keepdim=True) <= 1
    fixed = torch.cat([places, torch.ones_like(places[:, :1])], dim=1) * inside
    back = affine_ddf(torch.linalg.inv(true), shape)
    moving = warp(fixed, back, mode="linear", padding="zeros") * (
        warp(inside.double(), back, mode="linear", padding="zeros") > 0.99
    )
    whole = inside.clone()
    if cut != "neither":
        if cut != "fixed":
            moving[:, :, :, 38:] = 0
        if cut != "moving":
            fixed[:, :, 34:] = 0
        if cut == "both, differently":
            fixed[:, :, :, :20] = 0
    errors, unbounded = [], torch.full((1, 2), math.inf, dtype=torch.float64)
    for seen in (True, False):
        if not seen:
            monkeypatch.setattr("equireg.networks.affine.field_of_view", lambda _: (-unbounded, unbounded))
        matrix, misfit = AffineFit(Nearest(), rounds).eval()._at_once(moving, fixed)
        errors.append(((affine_ddf(matrix - true, shape) + places) * whole).norm(dim=1).max().item())
        if seen:
            assert misfit < 0.01
    assert errors[0] < 1.0, "voxels are matched with whole voxels"
    assert errors[1] < 1.0 if cut == "neither" else errors[1] > 3.0


class Centered(nn.Module):
    """Send every voxel to nearly one point, as attention does that tells no voxels apart."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        first, last = content_box(moving)
        at = identity_grid(list(fixed.shape[2:]), torch.float64)
        return 0.5 * (first + last).double().reshape(1, -1, 1, 1) - 0.98 * at


@pytest.mark.parametrize("cut", ["moving", "fixed"])
def test_an_image_that_is_cut_does_not_explode_where_nothing_is_found(cut: str) -> None:
    whole = place(spindle((25, 31)).double(), (60, 60), (20, 22))
    part = whole.clone()
    part[:, :, 32:] = 0
    pair = (part, whole) if cut == "moving" else (whole, part)
    assert [bool(_is_cut(image)) for image in pair] == [cut == "moving", cut == "fixed"]
    ddf = AffineFit(Centered(), 1).eval()(*pair)
    assert ddf.abs().max() < 10


def test_maps_that_leave_little_to_see_are_refused() -> None:
    image = place(spindle((25, 31)).double(), (60, 60), (20, 22))
    part = image.clone()
    part[:, :, 32:] = 0
    misfits = []
    for by in (0.0, 9.0):  # then rows of the fixed image that the moving one can show are only three of the tip
        start = torch.eye(3, dtype=torch.float64)[None, None].clone()
        start[..., 0, 2] = by
        misfits.append(AffineFit(Still(), 2).eval()._go_on(start, torch.zeros(1, 1), part, image)[1].item())
    assert misfits[0] < 1 < 2 <= misfits[1]


class OneRight(nn.Module):
    """Answer what is right, with noise, for the image as it is, and an exact mirror image for the turned one."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(1, 2, *fixed.shape[2:], dtype=torch.float64)
        if moving[0, 0, 0, 0] == fixed[0, 0, 0, 0]:
            return ddf + torch.randn(ddf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ddf[:, 0] = 8 - 2 * identity_grid([9, 9], torch.float64)[:, 0]
        return ddf


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_start_that_mirrors_never_wins(rounds: int) -> None:
    image = torch.arange(1.0, 82.0, dtype=torch.float64).reshape(1, 1, 9, 9)
    ddf = AffineFit(OneRight(), rounds, rotation_group(2, "pi")).eval()(image, image)
    assert ddf.abs().max() < 2.0  # 8 with the translation that a mirror is replaced by


class Still(nn.Module):
    """Answer that nothing moved, as networks do where an image is empty."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 2, *fixed.shape[2:], dtype=fixed.dtype)


def test_a_map_that_loses_the_content_never_wins() -> None:
    fit = AffineFit(Still())
    image = blob((12, 12), (5, 6), (2, 2))
    neither = torch.tensor([False])  # is cut
    misfits = fit._fit([torch.zeros_like(image), image], image, neither, neither)[1][:, 0]
    assert misfits[0] >= 2 > 1 > misfits[1]


@pytest.mark.parametrize("training", [False, True])
def test_several_moving_images_at_once(training: bool) -> None:
    net = randomized(CoordinateAttention(2, 1, 8)).train(training)
    movings, fixed = [content(9 + k, 12, seed=k) for k in range(3)], content(11, 10, seed=5)
    net.requires_grad_(False)
    for (there, back), moving in zip(both_of_each(net, movings, fixed), movings):
        if not training:  # in which features depend on what else is in the batch
            assert torch.allclose(there, net(moving, fixed), atol=1e-5)
            assert torch.allclose(back, net(fixed, moving), atol=1e-5)
        assert there.shape[2:] == fixed.shape[2:] and back.shape[2:] == moving.shape[2:]
    plain = both_of_each(Blobs(1.0), [blob((9, 9), (4, 4), (1, 1))], blob((9, 9), (5, 4), (1, 1)))
    assert plain[0][0].mean(dim=(0, 2, 3)).round(decimals=3).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_network_and_empty_samples_get_zero(training: bool) -> None:
    net = randomized(CARL(2, nesting="right", affine_rounds=2, **SMALL)).train(training)
    moving, fixed = content(14, 13, batch=2), content(12, 14, batch=2, seed=1)
    moving[0] = 0.0
    ddf = net.attention_stage()(moving, fixed)
    assert (ddf[0] == 0).all() and (ddf[1] != 0).any()
    ddf.square().mean().backward()
    gradients = [p.grad for p in net.attention_stage().parameters()]
    assert all(torch.isfinite(g).all() for g in gradients) and sum(float(g.abs().sum()) for g in gradients) > 0


def test_fit_and_halfway_have_the_right_gradients() -> None:
    there, back = matrix(2), torch.linalg.inv(matrix(2, seed=2))
    inputs = [m.clone().requires_grad_() for m in (there, back)]
    point = torch.ones(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: halfway(a, b, point), inputs)
    # Of a field that a map describes the robust fit is the plain one, slope and all.
    ddf = affine_ddf(matrix(2), [4, 5]).requires_grad_()
    votes = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (fit_affine(ddf, torch.ones(2, 1, 4, 5)) * votes).sum().backward()
    at = torch.cat([identity_grid([4, 5], torch.float64).flatten(2)[0], torch.ones(1, 20).double()])
    plain = votes[:, :2] @ torch.linalg.pinv(at).T
    torch.testing.assert_close(ddf.grad.flatten(2), plain, rtol=0, atol=1e-4)


def test_samples_without_a_root_leave_the_gradients_of_others_alone() -> None:
    there = torch.stack([torch.diag(torch.tensor(d)) for d in ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0])])
    there, back = (m.double().requires_grad_() for m in (there, torch.eye(3).repeat(3, 1, 1)))
    found = halfway(there, back, torch.ones(3, 2, dtype=torch.float64))
    (found * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert there.grad.isfinite().all() and back.grad.isfinite().all()
    assert (there.grad[1] != 0).any() and (there.grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_coordinates_are_never_counted_in_half_precision(dtype: torch.dtype) -> None:
    fixed, moving = blob((20, 22), (9, 10), (3, 3)).to(dtype), blob((22, 20), (12, 8), (4, 2)).to(dtype)
    ddf = AffineFit(Blobs(0.7), 2).eval()(moving, fixed)
    assert ddf.dtype == torch.promote_types(dtype, torch.float32) and ddf.isfinite().all()


class Recorded(nn.Module):
    """Answer the vector between the centers of the boxes, and note where the content of each moving image begins."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        (first, last), (fixed_first, fixed_last) = content_box(moving), content_box(fixed)
        self.sizes.append((last - first)[0].tolist())
        by = (first + last - fixed_first - fixed_last).to(moving.dtype) / 2
        return by.reshape(1, 2, 1, 1).expand(1, 2, *fixed.shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_content_moved_by_half_a_voxel_is_the_same_from_everywhere(dtype: torch.dtype) -> None:
    sizes = set()
    for at in range(12):
        net = Recorded()
        moving, fixed = content(12, 11, dtype=dtype), content(13, 14, seed=1, dtype=dtype)
        AffineFit(net, 2).eval()(place(moving, (40, 40), (at, 2 * at)), place(fixed, (40, 40), (13, 12)))
        sizes.add(tuple(net.sizes[2]))  # what the second round is given
    assert len(sizes) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("nesting", "turns"), [("attention", "none"), ("attention", "grid"), ("deck", "pi")])
def test_scripting_and_files(nesting: str, turns: str) -> None:
    net = randomized(CARL(2, nesting=nesting, affine_rounds=2, affine_turns=turns, **SMALL))
    moving, fixed = content(12, 14), content(14, 12, seed=1)
    # Hosts run graphs that were optimized for the shapes they saw, which takes ten times as long: one of three here.
    with torch.no_grad(), torch.jit.optimized_execution(turns == "none"):
        torch.testing.assert_close(torch.jit.script(net)(moving, fixed), net(moving, fixed), rtol=0, atol=1e-4)
        if turns != "grid":
            traced = torch.jit.trace(net, (fixed, fixed), check_trace=False)
            again = moving.flip(2).transpose(2, 3)  # of the traced shape, but lost where the example was found
            torch.testing.assert_close(traced(again, fixed), net(again, fixed), rtol=0, atol=1e-4)
    same, plain = CARL(**net.arguments), CARL(2, nesting=nesting, **SMALL)
    same.load_state_dict(net.state_dict())
    assert "affine_rounds" not in plain.arguments, "files written before the argument existed must keep loading"
    state = {**plain.state_dict(), "_extra_state": net.state_dict()["_extra_state"]}
    with pytest.raises(ValueError, match="affine_rounds 2 instead of None"):
        plain.load_state_dict(state)
    named = json.dumps({**plain.arguments, "affine_rounds": 0})
    plain.load_state_dict({**plain.state_dict(), "_extra_state": torch.tensor(list(named.encode()), dtype=torch.uint8)})


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        AffineFit(Blobs(1.0), 0)
    with pytest.raises(ValueError, match="0 for nesting 'attention'"):
        CARL(2, **SMALL, nesting="attention", extra_refinements=1)
    with pytest.raises(ValueError, match="affine_turns 'grid' needs affine_rounds of at least 1, got 0"):
        CARL(2, **SMALL, affine_turns="grid")
    with pytest.raises(ValueError, match="one of none, pi, grid, got 'all'"):
        CARL(2, **SMALL, affine_rounds=1, affine_turns="all")
    for options in ({"affine_rounds": -1}, {"affine_rounds": 1, "nesting": "left"}):
        with pytest.raises(ValueError, match="affine_rounds must be at least 0"):
            CARL(2, **SMALL, **options)
