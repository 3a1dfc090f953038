"""The assembled network: published layers, equivariance by construction, and what a user may ask of it."""

from __future__ import annotations

import pytest
import torch
from helpers_networks import SMALL, content, count, moved_field, place, randomized, vector

from equireg.networks import CARL, TwoStep
from equireg.networks.carl import NESTINGS, arguments_from_state

CONTENT = {2: (13, 10), 3: (7, 6, 8)}
CANVAS = {2: ((22, 24), (4, 9)), 3: ((13, 12, 14), (2, 4, 3))}
# Other canvases of the moving image and where its content starts: all phases, each border, cropped, another shape.
OTHERS = {
    2: [((22, 24), (5, 11)), ((22, 24), (9, 0)), ((13, 10), (0, 0)), ((17, 33), (2, 23)), ((40, 12), (27, 1))],
    3: [((13, 12, 14), (6, 0, 6)), ((7, 6, 8), (0, 0, 0)), ((9, 15, 11), (1, 9, 2))],
}
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-13}  # voxels; measured: 8e-6 and 2e-14


def carl(dims: int, nesting: str = "deck", dtype: torch.dtype = torch.float32, **options) -> CARL:
    return randomized(CARL(dims, nesting=nesting, **{**SMALL, **options}), dtype)


REFINED = [nesting for nesting in NESTINGS if nesting != "attention"]


def pair(dims: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    moving, fixed = content(*CONTENT[dims], dtype=dtype), content(*CONTENT[dims], seed=1, dtype=dtype)
    return moving, place(fixed, *CANVAS[dims])


# ---- layers


@pytest.mark.parametrize(("dims", "attention", "refinement"), [(2, 1_330_304, 4_756_902), (3, 3_986_816, 17_670_229)])
def test_published_parameter_counts(dims: int, attention: int, refinement: int) -> None:
    with torch.device("meta"):
        net = CARL(dims, nesting="right", factor=4, refinement_channels=(16, 32, 64, 256, 512))
        more = CARL(dims, extra_refinements=1)
    assert count(net) == attention + 2 * refinement
    assert count(more) == attention + 3 * refinement
    assert count(net.attention_stage()) == attention


@pytest.mark.parametrize("nesting", REFINED)
def test_nestings_have_the_same_parts_in_another_order(nesting: str) -> None:
    net, other = carl(2, nesting, extra_refinements=2), carl(2, extra_refinements=2)
    assert count(net) == count(other)
    steps = net.steps
    for _ in range(2):
        assert isinstance(steps, TwoStep)
        steps = steps.first
    values, fixed = pair(2)
    assert not torch.allclose(net(place(values, *CANVAS[2]), fixed), steps(place(values, *CANVAS[2]), fixed))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_untrained_refinements_change_nothing(nesting: str) -> None:
    net = CARL(2, nesting=nesting, **SMALL).eval()
    values, fixed = pair(2)
    moving = place(values, *CANVAS[2])
    torch.testing.assert_close(net(moving, fixed), net.attention_stage()(moving, fixed), rtol=0, atol=1e-5)


# ---- equivariance


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nesting", REFINED)
@pytest.mark.parametrize("dims", [2, 3])
def test_answer_follows_the_moving_content(dims: int, nesting: str, dtype: torch.dtype) -> None:
    """By any whole vector, not only multiples of the pooling factor, onto canvases of other shapes."""
    net, (values, fixed) = carl(dims, nesting, dtype), pair(dims, dtype)
    ddf = net(place(values, *CANVAS[dims]), fixed)
    assert (ddf - net.attention_stage()(place(values, *CANVAS[dims]), fixed)).abs().max() > 0.3
    for shape, at in OTHERS[dims]:
        by = [a - b for a, b in zip(at, CANVAS[dims][1])]
        error = (net(place(values, shape, at), fixed) - ddf - vector(by, ddf)).abs().max()
        assert error < TOLERANCE[dtype], (shape, at)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_equivariance_at_other_factors_and_channels(factor: int) -> None:
    net = carl(2, "left" if factor % 2 == 0 else "right", torch.float64, factor=factor, in_channels=3, padding=0)
    values = content(*CONTENT[2], channels=3, dtype=torch.float64)
    fixed = place(content(*CONTENT[2], channels=3, seed=1, dtype=torch.float64), *CANVAS[2])
    ddf = net(place(values, *CANVAS[2]), fixed)
    for shape, at in OTHERS[2]:
        by = [a - b for a, b in zip(at, CANVAS[2][1])]
        error = (net(place(values, shape, at), fixed) - ddf - vector(by, ddf)).abs().max()
        assert error < TOLERANCE[torch.float64], (shape, at)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("dims", [2, 3])
def test_attention_stage_follows_the_fixed_content(dims: int, nesting: str, dtype: torch.dtype) -> None:
    stage, (values, fixed) = carl(dims, nesting, dtype).attention_stage(), pair(dims, dtype)
    moving = place(values, *CANVAS[dims])
    inside = fixed[(..., *[slice(a, a + n) for a, n in zip(CANVAS[dims][1], CONTENT[dims])])]
    # A reference canvas with room around the content, for the field to reach what it continues with.
    shape, at = [n + 8 for n in CANVAS[dims][0]], [a + 4 for a in CANVAS[dims][1]]
    ddf = stage(moving, place(inside, shape, at))
    # Pooled twice, a canvas that ends with the content cuts off what is interpolated at its last voxel.
    room = 2 if nesting == "left" else 0
    for other_shape, other_at in [([n + room for n in shape], at) for shape, at in OTHERS[dims]]:
        by = [a - b for a, b in zip(other_at, at)]
        expected = moved_field(ddf, other_shape, by) - vector(by, ddf)
        answer = stage(moving, place(inside, other_shape, other_at))
        torch.testing.assert_close(answer, expected, rtol=0, atol=TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("nesting", REFINED)
def test_field_depends_on_what_the_content_is(nesting: str) -> None:
    net, (values, fixed) = carl(2, nesting), pair(2)
    permuted = values.flatten()[torch.randperm(values.numel())].reshape(values.shape)
    one, two = (net(place(v, *CANVAS[2]), fixed) for v in (values, permuted))
    assert (one - two).abs().max() > 0.5


# ---- what it takes and gives


@torch.no_grad()
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize(
    ("moving", "fixed"),
    [((5, 17), (33, 5)), ((1, 1), (2, 3)), ((13, 7), (13, 7)), ((5, 17, 9), (9, 5, 11)), ((1, 5, 2), (1, 5, 2))],
)
def test_any_shapes(moving: tuple[int, ...], fixed: tuple[int, ...], nesting: str) -> None:
    net = carl(len(moving), nesting)
    one, two = content(*moving, batch=2), content(*fixed, batch=2, seed=1)
    there, back = net.both(one, two)
    assert there.shape == (2, len(moving), *fixed) and back.shape == (2, len(moving), *moving)
    assert torch.isfinite(there).all() and torch.isfinite(back).all()
    torch.testing.assert_close(there, net(one, two), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_an_empty_sample_is_left_alone(nesting: str, training: bool) -> None:
    net = carl(2, nesting).train(training)
    moving, fixed = content(16, 15, batch=3), content(14, 15, batch=3, seed=1)
    moving[0], fixed[2] = 0.0, 0.0
    for ddf in net.both(moving.requires_grad_(), fixed):
        assert (ddf[[0, 2]] == 0).all() and (ddf[1] != 0).any()
        ddf.square().mean().backward(retain_graph=True)
    for gradient in [moving.grad, *(p.grad for p in net.parameters())]:
        assert gradient is not None and torch.isfinite(gradient).all()


def test_nothing_at_all() -> None:
    net = carl(2).train()
    ddf = net(torch.zeros(2, 1, 9, 8), torch.zeros(2, 1, 9, 8))
    ddf.sum().backward()
    assert (ddf == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_mixed_precision(nesting: str, dtype: torch.dtype) -> None:
    net, (values, fixed) = carl(2, nesting), pair(2)
    moving = place(values, *CANVAS[2])
    with torch.autocast("cpu", dtype=dtype):
        ddf = net(moving, fixed)
    expected = net(moving, fixed)
    assert ddf.dtype == torch.float32
    assert torch.isfinite(ddf).all()
    assert (ddf - expected).abs().mean() < {torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    ddf.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("nesting", REFINED)
def test_state_dict_describes_the_network(nesting: str, tmp_path) -> None:
    net = carl(2, nesting, factor=2, extra_refinements=1, padding=1, in_channels=2)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    arguments = arguments_from_state(state["_extra_state"])
    assert arguments == net.arguments
    twin = CARL(**arguments).eval()
    twin.load_state_dict(state)
    image = content(17, 14, channels=2)
    assert torch.equal(twin(image, image.flip(2)), net(image, image.flip(2)))
    assert twin.arguments == {
        "spatial_dims": 2,
        "in_channels": 2,
        "feature_channels": 8,
        "factor": 2,
        "nesting": nesting,
        "refinement_channels": [4, 8],
        "extra_refinements": 1,
        "padding": 1,
    }
    with pytest.raises(ValueError, match="another network: feature_channels 8 instead of 12"):
        CARL(**{**arguments, "feature_channels": 12}).load_state_dict(state)


def test_arguments_are_a_copy() -> None:
    net = carl(2)
    net.arguments["factor"] = 99
    assert net.arguments["factor"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": "4"}, "factor"),
        ({"factor": 2.5}, "factor"),
        ({"refinement_channels": 16}, "channels"),
        ({"padding": None}, "padding"),
        ({"nesting": "middle"}, "one of deck, right, left, attention, got 'middle'"),
        ({"factor": 0}, "factor must be at least 1, .*got 0"),
        ({"factor": 3, "nesting": "left"}, "even for nesting 'left', got 3"),
        ({"extra_refinements": -1}, "got -1"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"refinement_channels": ()}, "at least one positive width"),
    ],
)
def test_carl_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CARL(**{"spatial_dims": 2, **SMALL, **options})


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize(
    ("moving", "fixed", "message"),
    [
        ((1, 2, 9, 9), (1, 1, 9, 9), r"moving image must have 1 channel\(s\), got 2 in shape \[1, 2, "),
        ((1, 1, 9, 9), (1, 3, 9, 9), r"fixed image must have 1 channel\(s\), got 3 in shape \[1, 3, "),
        ((2, 1, 9, 9), (3, 1, 9, 9), "one batch size, got 2 and 3"),
        ((1, 1, 9, 9, 9), (1, 1, 9, 9, 9), r"moving image must have 4 axes \(batch, channel and 2 spatial ones\)"),
        ((1, 1, 9, 9), (1, 1, 9), "fixed image must have 4 axes"),
        ((1, 1, 9, 9), (1, 1, 0, 9), r"fixed image must not have an empty axis, got shape \[1, 1, 0, 9\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(moving, fixed, message: str, nesting: str) -> None:
    net = carl(2, nesting)
    for call in (net, net.both):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(moving), torch.ones(fixed))
