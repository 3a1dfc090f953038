"""Attention on rotation-averaged features follows grid rotations of either image, whatever the sizes are."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from helpers_networks import SMALL, blocks, content, place, randomized, sharpened, spread

from equireg.equivariance import error_map
from equireg.fields import identity_grid, resize
from equireg.moves import rotation, translation
from equireg.networks import CARL, CoordinateAttention, Downsample
from equireg.networks.active import continue_affinely
from equireg.networks.carl import arguments_from_state
from equireg.networks.rotation import rotation_group, turn, turn_back, turn_matrix

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}  # voxels; measured: 2e-14 and 1e-5
# Sizes of moving and fixed content: multiples of the pooling factor, odd and even, of one parity and mixed.
SIZES = {
    2: [((12, 8), (16, 12)), ((13, 10), (11, 14)), ((9, 9), (5, 7))],
    3: [((9, 8, 10), (8, 11, 6))],
}


PLACES = {  # canvas, and where the content starts on it, of moving and fixed
    2: (((19, 21), (4, 9)), ((23, 17), (5, 2))),
    3: (((12, 12, 12), (2, 3, 1)), ((10, 12, 11), (1, 0, 4))),
}


def pair(sizes, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    values = [blocks(*size, seed=k, dtype=dtype) for k, size in enumerate(sizes)]
    return [place(value, *where) for value, where in zip(values, PLACES[len(sizes[0])])]


def largest(stage, moving, fixed, **moves) -> float:
    return error_map(stage, moving, fixed, **moves).nan_to_num(0.0).max().item()


# ---- the group


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["none", "pi", "grid"])
def test_it_is_a_group_of_rotations(dims: int, name: str) -> None:
    matrices = [turn_matrix(*g) for g in rotation_group(dims, name)]
    assert torch.equal(matrices[0], torch.eye(dims, dtype=torch.float64))
    assert len({tuple(m.flatten().tolist()) for m in matrices}) == len(matrices)
    for a in matrices:
        assert torch.det(a) == 1 and torch.equal(a @ a.T, matrices[0])
        for b in matrices:
            assert any(torch.equal(a @ b, c) for c in matrices)


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="one of none, pi, grid, got 'all'"):
        CARL(2, **SMALL, rotation_group="all")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)])
def test_a_turn_moves_voxels_as_its_matrix_says(shape: tuple[int, ...]) -> None:
    grid = identity_grid(list(shape), torch.float64)
    for perm, signs in rotation_group(len(shape), "grid"):
        turned = turn(grid, perm, signs)  # at each new voxel, the old index
        new = identity_grid(list(turned.shape[2:]), torch.float64)
        center = [(torch.tensor(s, dtype=torch.float64) - 1) / 2 for s in (shape, turned.shape[2:])]
        view = [1, -1] + [1] * len(shape)
        expected = torch.einsum("ij,bj...->bi...", turn_matrix(perm, signs), turned - center[0].reshape(view))
        assert torch.equal(expected + center[1].reshape(view), new)
        assert torch.equal(turn_back(turned, perm, signs), grid)


# ---- exactness


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dims", "sizes"), [(dims, sizes) for dims in SIZES for sizes in SIZES[dims]])
@pytest.mark.parametrize("nesting", ["deck", "left"])
def test_attention_stage_follows_turns_of_either_image(dims: int, sizes, nesting: str, dtype: torch.dtype) -> None:
    moving, fixed = pair(sizes, dtype)
    net = CARL(dims, nesting=nesting, rotation_group="grid", **SMALL)
    stage = sharpened(randomized(net, dtype).attention_stage(), moving, fixed)
    assert spread(stage(moving, fixed)) > {2: 0.5, 3: 0.05}[dims], (
        "an answer that sends all to one place turns trivially"
    )
    for perm, signs in rotation_group(dims, "grid")[1 :: 1 if dims == 2 else 9]:
        matrix = turn_matrix(perm, signs)
        for name, image in (("move_moving", moving), ("move_fixed", fixed)):
            error = largest(stage, moving, fixed, **{name: rotation(matrix, image.shape[2:])})
            assert error < TOLERANCE[dtype], (perm, signs, name)


@pytest.mark.parametrize(("dims", "group"), [(2, "pi"), (3, "pi"), (2, "grid")])
def test_attention_alone_follows_its_group(dims: int, group: str) -> None:
    moving, fixed = pair([[6, 7, 3][:dims], [5, 6, 4][:dims]])
    net = randomized(CoordinateAttention(dims, 1, 8, rotation_group=group), torch.float64)
    assert spread(sharpened(net, moving, fixed)(moving, fixed)) > 0.1
    for perm, signs in rotation_group(dims, group):
        matrix = turn_matrix(perm, signs)
        moves = {"move_moving": rotation(matrix, moving.shape[2:]), "move_fixed": rotation(matrix.T, fixed.shape[2:])}
        assert largest(net, moving, fixed, **moves) < 1e-12


@pytest.mark.parametrize("group", ["none", "pi"])
def test_a_smaller_group_does_not_follow_a_quarter_turn(group: str) -> None:
    moving, fixed = pair(SIZES[2][1])
    stage = randomized(CARL(2, rotation_group=group, **SMALL), torch.float64).attention_stage()
    stage = sharpened(stage, moving, fixed)
    assert largest(stage, moving, fixed, move_moving=rotation(turn_matrix([1, 0], [1, -1]), moving.shape[2:])) > 1.0


@pytest.mark.parametrize("nesting", ["deck", "right", "left"])
def test_translations_stay_exact(nesting: str) -> None:
    net = randomized(CARL(2, nesting=nesting, rotation_group="grid", **SMALL), torch.float64)
    moving, fixed = pair(SIZES[2][1])
    for by in ([3, -1], [-4, 8], [1, 0]):
        assert largest(net, moving, fixed, move_moving=translation(by, (28, 32))) < 1e-12
        assert largest(net.attention_stage(), moving, fixed, move_fixed=translation(by, (30, 31))) < 1e-12


# ---- parts


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 8])
def test_centered_blocks_are_symmetric_and_lose_nothing(factor: int, size: int) -> None:
    net = Downsample(torch.nn.Identity(), factor, content_phase=True, centered=True)
    for start in range(5):
        image = place(content(size, 3, dtype=torch.float64), (size + 6, 9), (start, 4))
        phase = net._phase(image)
        pooled = net._pool(image, phase)
        assert (phase > -factor).all() and (phase <= factor).all()
        assert pooled.sum().item() * factor**2 == pytest.approx(image.sum().item(), rel=1e-12)
        used = (pooled[0, 0] != 0).any(dim=1).nonzero().flatten()
        assert len(used) == -(-size // factor)
        # A coarse voxel's center lies at fine index factor (c - 1) + (factor - 1) / 2 + phase: here, those of the box.
        center = factor * (used.double().mean() - 1) + (factor - 1) / 2 + 0.5 * phase[0, 0]
        assert center.item() == start + (size - 1) / 2
        mirrored = image.flip([2])
        assert (net._pool(mirrored, net._phase(mirrored)).sum(dim=3).flatten().sort().values).allclose(
            pooled.sum(dim=3).flatten().sort().values, rtol=0, atol=1e-12
        )


def test_half_phases_lift_to_where_coarse_voxels_lie() -> None:
    net = Downsample(torch.nn.Identity(), 4, content_phase=True, centered=True)
    for phase in ([0, 0], [-3, 0], [1, 2], [4, -1]):
        fixed_phase = torch.tensor([phase])
        offset = 0.5 * fixed_phase.reshape(1, 2, 1, 1)
        position = 4 * (identity_grid([8, 9], torch.float64) - 1) + 1.5 + offset
        lifted = net._lift(position / 4, torch.zeros_like(fixed_phase), fixed_phase, [22, 25]) + offset
        torch.testing.assert_close(lifted, identity_grid([22, 25], torch.float64), rtol=0, atol=1e-12)
    assert resize(torch.zeros(1, 2, 8, 9), 4).shape == (1, 2, 32, 36)


def test_centered_needs_content() -> None:
    with pytest.raises(ValueError, match="centered needs content_phase"):
        Downsample(torch.nn.Identity(), 2, centered=True)


@pytest.mark.parametrize("dims", [2, 3])
def test_affine_fields_continue_as_they_are(dims: int) -> None:
    shape = (7, 9, 6)[:dims]
    grid = identity_grid(list(shape), torch.float64)
    matrix = torch.randn(2, dims, dims, dtype=torch.float64)
    ddf = torch.einsum("bij,bj...->bi...", matrix, grid.expand(2, *grid.shape[1:])) + 3.0
    first, last = torch.tensor([[2, 3, 1][:dims], [0, 4, 2][:dims]]), torch.tensor([[4, 4, 3][:dims], [6, 8, 4][:dims]])
    torch.testing.assert_close(continue_affinely(ddf, first, last), ddf, rtol=0, atol=1e-11)


def test_a_box_of_one_voxel_continues_its_displacement() -> None:
    ddf = torch.randn(1, 2, 5, 6)
    at = torch.tensor([[2, 3]])
    assert torch.allclose(continue_affinely(ddf, at, at), ddf[:, :, 2:3, 3:4].expand_as(ddf))


# ---- as a part of what there was


@pytest.mark.parametrize("group", ["pi", "grid"])
def test_state_dict_names_the_group(group: str) -> None:
    net, plain = CARL(2, rotation_group=group, **SMALL), CARL(2, **SMALL)
    assert CARL(**net.arguments).arguments["rotation_group"] == group
    assert "rotation_group" not in plain.arguments, "files written before the argument existed must keep loading"
    assert {k: v.shape for k, v in net.named_parameters()} == {k: v.shape for k, v in plain.named_parameters()}
    with pytest.raises(ValueError, match=f"rotation_group None instead of {group}"):
        net.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=f"rotation_group {group} instead of None"):
        plain.load_state_dict(net.state_dict())


def test_a_file_that_names_no_group_is_one_without() -> None:
    net, state = CARL(2, **SMALL), CARL(2, **SMALL).state_dict()
    named = json.dumps({**arguments_from_state(state["_extra_state"]), "rotation_group": "none"})
    net.load_state_dict({**state, "_extra_state": torch.tensor(list(named.encode()), dtype=torch.uint8)})
    assert net.arguments == CARL(**json.loads(named)).arguments


@pytest.mark.parametrize(("nesting", "group"), [pytest.param("deck", "grid", marks=pytest.mark.slow), ("left", "pi")])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_scripting_tracing_and_export(nesting: str, group: str) -> None:
    """On content elsewhere and of another size than it was recorded with, in a batch."""
    net = randomized(CARL(2, nesting=nesting, rotation_group=group, **SMALL))
    example = [torch.cat([image, image.flip(2)]) for image in pair(SIZES[2][0], torch.float32)]
    other = [torch.cat([image.flip(3), image]) for image in pair(SIZES[2][2], torch.float32)]
    expected = net(*other)
    with torch.no_grad():
        compiled = {
            "script": torch.jit.script(net),
            "trace": torch.jit.trace(net, tuple(example), check_trace=False),
            "export": torch.export.export(net, tuple(example)).module(),
        }
        for name, module in compiled.items():
            torch.testing.assert_close(module(*other), expected, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_empty_samples(training: bool) -> None:
    net = randomized(CARL(2, rotation_group="grid", **SMALL)).train(training)
    moving, fixed = content(14, 13, batch=2), content(12, 14, batch=2, seed=1)
    moving[0] = 0.0
    there, back = net.both(moving, fixed)
    assert (there[0] == 0).all() and (back[0] == 0).all() and (there[1] != 0).any()
    (there.square().mean() + back.square().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_attention_stage_is_in_the_networks_mode() -> None:
    net = CARL(2, **SMALL)
    assert net.attention_stage().training and not net.eval().attention_stage().training


@pytest.mark.parametrize("nesting", ["deck", "right"])
def test_the_whole_network_follows_turns_of_the_moving_image_where_its_content_is(nesting: str) -> None:
    """The moved image stays, so the U-Nets answer as before; only where they point off the canvas nothing turns."""
    moving, fixed = (torch.nn.functional.pad(image, [16] * 4) for image in pair(SIZES[2][1]))
    net = randomized(CARL(2, nesting=nesting, rotation_group="grid", **SMALL), torch.float64)
    sharpened(net, moving, fixed)
    for perm, signs in rotation_group(2, "grid"):
        errors = error_map(net, moving, fixed, rotation(turn_matrix(perm, signs), moving.shape[2:]))
        assert errors[fixed[:, 0] != 0].max() < 1e-12


@pytest.mark.parametrize(("dims", "shape"), [(2, (40, 36)), (3, (14, 12, 13))])
def test_features_lose_what_all_voxels_share(dims: int, shape: tuple[int, ...]) -> None:
    """What is the same at all voxels tells no two of them apart."""
    torch.manual_seed(0)
    network = CoordinateAttention(dims, feature_channels=16, rotation_group="grid", padding=0).train()
    image = torch.rand(1, 1, *shape) + 0.1
    active = torch.ones_like(image)
    plain = torch.zeros(1, 16, *shape)
    for perm, signs in network.turns:
        plain += turn_back(network.encoder(turn(image, perm, signs), turn(active, perm, signs)), perm, signs)

    def shared(features: torch.Tensor) -> float:
        return F.normalize(features, dim=1).flatten(2).mean(dim=2).norm().item()

    assert 2 * shared(network._features(image, active)) < shared(plain)
