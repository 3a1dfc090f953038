"""The encoder sees content alone, attention is an explicit softmax, and the answer follows every whole-voxel move."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers_networks import content, count, moved_field, place, randomized, vector
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from equireg.networks import CoordinateAttention, Downsample
from equireg.networks.attention import _attend, attend
from equireg.networks.encoder import Encoder
from equireg.networks.streaming import streamed_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}  # voxels; measured: 1.4e-6 and 5e-15
DTYPES = [torch.float32, torch.float64]
# Content size, the canvas it lies in first, and other canvases with the place of the content's first voxel in each:
# in the middle, touching each border, cropped to the content, and far away in a corner.
CONTENT = {2: (9, 7), 3: (5, 4, 6)}
CANVAS = {2: ((19, 18), (5, 6)), 3: ((12, 11, 13), (3, 3, 4))}
OTHERS = {
    2: [((19, 18), (8, 2)), ((19, 18), (0, 11)), ((19, 18), (10, 0)), ((9, 7), (0, 0)), ((31, 9), (22, 2))],
    3: [((12, 11, 13), (7, 0, 7)), ((5, 4, 6), (0, 0, 0)), ((6, 17, 9), (1, 13, 0))],
}
CASES = [(dims, padding, *other) for dims in (2, 3) for padding in (0, 2) for other in OTHERS[dims]]
CASES += [(2, 9, *OTHERS[2][1]), (2, 9, *OTHERS[2][4]), (3, 5, *OTHERS[3][1])]  # 9 is the authors', on large canvases


def attention(dims: int, dtype: torch.dtype = torch.float32, padding: int = 2, channels: int = 1):
    return randomized(CoordinateAttention(dims, channels, 8, padding=padding), dtype)


class PlainEncoder(nn.Module):
    """The same layers as everybody writes them: zero padding, biases, torch's batch normalization."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        def convolve(layer, x: torch.Tensor) -> torch.Tensor:
            function = F.conv2d if x.dim() == 4 else F.conv3d
            dilation = layer.conv.dilation
            return function(x, layer.conv.weight, layer.bias, padding=dilation, dilation=dilation)

        x = torch.relu(convolve(self.encoder.first, image))
        for block in (self.encoder.block1, self.encoder.block2, self.encoder.block3):
            norm = block.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
            x = x + convolve(block.conv3, convolve(block.conv2, convolve(block.conv1, x).relu()).relu())
        return 4.0 * x / (x.norm(dim=1, keepdim=True) + 1e-3)


@pytest.fixture
def whole_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have eager mode compute on whole canvases, as scripted, traced and compiled networks do."""

    def keep(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, torch.zeros(image.shape[0], image.dim() - 2, dtype=torch.long)

    monkeypatch.setattr("equireg.networks.attention.crop_to_content", keep)


# ---- encoder


@pytest.mark.parametrize(("dims", "expected"), [(2, 1_330_304), (3, 3_986_816)])
def test_published_parameter_counts(dims: int, expected: int) -> None:
    assert count(CoordinateAttention(dims, 1, 128)) == expected


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_encoder_has_the_layers_of_a_plain_one(dims: int) -> None:
    """Where everything is active, only the border tells them apart: it reaches 22 voxels in, or the layers differ."""
    encoder = randomized(Encoder(dims, 2, 3), torch.float64)
    shape = (47, 46, 45)[:dims]
    image = torch.randn(1, 2, *shape, dtype=torch.float64)
    difference = (encoder(image, torch.ones_like(image[:, :1])) - PlainEncoder(encoder)(image, image)).abs()
    assert difference[(..., *[slice(22, -22)] * dims)].max() < 1e-12
    assert difference.max() > 1e-3


@pytest.mark.parametrize(("dims", "padding", "shape", "at"), CASES)
@torch.no_grad()
def test_features_are_the_contents_alone(dims: int, padding: int, shape, at) -> None:
    net, values = attention(dims, padding=padding, channels=2), content(*CONTENT[dims], channels=2)
    size = [n + 2 * padding for n in CONTENT[dims]]

    def features(shape, at) -> torch.Tensor:
        encoded, active = net._encode(place(values, shape, at))
        # On the padded canvas the grown box of the content starts where the content does on the canvas.
        for axis, (start, length) in enumerate(zip(at, size)):
            encoded, active = encoded.narrow(2 + axis, start, length), active.narrow(2 + axis, start, length)
        assert active.all()
        return encoded

    reference = features(*CANVAS[dims])
    torch.testing.assert_close(features(shape, at), reference, rtol=0, atol=1e-5)
    assert reference.std(dim=list(range(2, 2 + dims))).max() > 0.3
    norm = reference.norm(dim=1)
    assert (norm <= 4.0 + 1e-5).all() and norm.min() > 3.9


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 3)])
def test_batch_normalization_counts_active_voxels_only(shape: tuple[int, ...]) -> None:
    norm = Encoder(len(shape), 1, 5).block1.norm.double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    reference = nn.BatchNorm1d(5, dtype=torch.float64)
    reference.load_state_dict(norm.state_dict(), strict=False)
    active = (torch.rand(3, 1, *shape) < 0.4).double()
    background = torch.randn(5, dtype=torch.float64)
    for step in range(3):
        deviation = (torch.randn(3, 5, *shape, dtype=torch.float64) * (1 + step) * active).requires_grad_()
        out, out_background = norm.train()(deviation, background, active)
        gathered = (deviation + background.reshape(1, 5, *[1] * len(shape))).movedim(1, -1)[active[:, 0] > 0]
        expected = reference.train()(gathered)
        got = (out + out_background.reshape(1, 5, *[1] * len(shape))).movedim(1, -1)[active[:, 0] > 0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_mean, reference.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, reference.running_var, rtol=0, atol=1e-12)
        assert (out * (1 - active) == 0).all()
        weights = torch.randn_like(got)
        (mine,) = torch.autograd.grad((got * weights).sum(), deviation, retain_graph=True)
        (theirs,) = torch.autograd.grad((expected * weights).sum(), deviation)
        torch.testing.assert_close(mine * active, theirs * active, rtol=0, atol=1e-12)
    # In eval mode both use what they have seen, and the response to background follows the same line.
    out, out_background = norm.eval()(deviation, background, active)
    got = (out + out_background.reshape(1, 5, *[1] * len(shape))).movedim(1, -1)[active[:, 0] > 0]
    torch.testing.assert_close(got, reference.eval()(gathered), rtol=0, atol=1e-12)
    torch.testing.assert_close(out_background, reference(background.expand(2, 5))[0], rtol=0, atol=1e-12)


def test_training_statistics_do_not_depend_on_the_canvas() -> None:
    states = []
    for shape, at in [((12, 11), (1, 2)), ((25, 30), (14, 19))]:
        torch.manual_seed(1)
        net = CoordinateAttention(2, 1, 8).train()
        image = place(content(8, 9), shape, at)
        net(image, image)
        states.append({k: v for k, v in net.state_dict().items() if "running" in k})
    assert len(states[0]) == 6
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def running(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items() if "running" in name}


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("factor", [1, 3])
def test_an_empty_pair_leaves_its_batch_in_training_alone(factor: int, two_way: bool) -> None:
    net = Downsample(attention(2), factor, content_phase=True).double().train()
    twin = copy.deepcopy(net)
    moving = place(content(9, 8, dtype=torch.float64), (21, 18), (3, 8))
    fixed = place(content(8, 9, seed=1, dtype=torch.float64), (21, 18), (10, 2))

    def answer(net: nn.Module, *pair: torch.Tensor) -> torch.Tensor:
        return torch.cat(net.both(*pair) if two_way else [net(*pair)], dim=1)

    alone = answer(net, moving, fixed)
    together = answer(twin, *(torch.cat([torch.zeros_like(image), image]) for image in (moving, fixed)))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-10)
    assert (together[0] == 0).all() and alone.std() > 0.1
    for name, value in running(net).items():
        torch.testing.assert_close(running(twin)[name], value, rtol=0, atol=1e-12)
    together.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters())


def test_a_batch_of_nothing_leaves_running_statistics_alone() -> None:
    net = attention(2).train()
    before, nothing = running(net), torch.zeros(2, 1, 6, 7, requires_grad=True)
    ddf = net(nothing, nothing)
    assert len(before) == 6 and all(torch.equal(value, before[name]) for name, value in running(net).items())
    assert (ddf == 0).all()
    ddf.sum().backward()
    assert all(torch.isfinite(g).all() for g in [nothing.grad, *(p.grad for p in net.parameters())])


# ---- attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_leaves_automatic_mixed_precision(dtype: torch.dtype) -> None:
    """Coordinates of hundreds of voxels come out as they went in."""
    queries, keys = (4 * F.normalize(torch.randn(2, n, 8), dim=2) for n in (50, 70))
    values, allowed = 300 * torch.randn(2, 70, 3), torch.ones(2, 70, dtype=torch.bool)
    expected = attend(queries, keys, values, allowed)
    with torch.autocast("cpu", dtype=dtype):
        assert (attend(queries, keys, values, allowed) - expected).abs().max() < 1e-6 * expected.abs().max()
        # Features that come rounded are compared as they are, by coordinates that are not.
        rounded = attend(queries.to(dtype), keys.to(dtype), values, allowed)
    assert rounded.dtype == torch.float32
    exact = attend(queries.to(dtype).float(), keys.to(dtype).float(), values, allowed)
    assert (rounded - exact).abs().max() < 1e-6 * expected.abs().max()


class Given(nn.Module):
    """Looks like an encoder and answers distinct features of half precision, whatever precision it is called in."""

    def forward(self, image: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        index = torch.arange(image[:, :1].numel(), dtype=torch.float32).reshape(image[:, :1].shape)
        features = torch.cat([torch.sin(index * k) for k in (0.3, 0.7, 1.1, 1.9)], dim=1)
        return (4 * F.normalize(features, dim=1)).to(torch.bfloat16).to(image.dtype)


def test_coordinates_do_not_depend_on_the_precision() -> None:
    """Features being equal, displacements of hundreds of voxels are: under autocast and for half precision images."""
    net = attention(2)
    net.encoder = Given()
    moving, fixed = place(content(5, 300), (7, 700), (1, 390)), place(content(6, 40, seed=1), (9, 60), (2, 20))
    expected = net(moving, fixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (net(moving, fixed) - expected).abs().max() < 1e-3
    half = net(moving.bfloat16(), fixed.bfloat16())
    assert half.dtype == torch.float32 and (half - expected).abs().max() < 1e-3


@pytest.mark.parametrize("function", [attend, _attend, streamed_attention])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_an_explicit_softmax(masked: bool, function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equireg.networks.streaming.QUERIES", 4)  # 11 and 17 are no multiples of the blocks
    monkeypatch.setattr("equireg.networks.streaming.KEYS", 5)
    queries, keys = (4 * F.normalize(torch.randn(3, n, 8, dtype=torch.float64), dim=2) for n in (11, 17))
    values = torch.randn(3, 17, 3, dtype=torch.float64)
    allowed = torch.rand(3, 17) < 0.4 if masked else torch.ones(3, 17, dtype=torch.bool)
    allowed[:, 5] = True
    leaves = [t.requires_grad_() for t in (queries, keys, values)]
    logits = torch.einsum("bqf,bkf->bqk", queries, keys).masked_fill(~allowed[:, None], float("-inf"))
    expected = torch.softmax(logits, dim=2) @ values
    answer = function(queries, keys, values, allowed)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((answer * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves)
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    single = function(queries.float(), keys.float(), values.float(), allowed)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


def test_streamed_attention_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(2, n, w, dtype=torch.float64, generator=generator).requires_grad_()
        for n, w in ((5, 6), (7, 6), (7, 2))
    )
    allowed = torch.rand(2, 7, generator=generator) < 0.7
    assert not allowed.all() and allowed.any(dim=1).all()
    assert torch.autograd.gradcheck(lambda q, k, v: streamed_attention(q, k, v, allowed), (queries, keys, values))


def test_the_way_back_leaves_autocast_as_well() -> None:
    queries, keys = (torch.randn(1, n, 8, requires_grad=True) for n in (5, 7))
    values, allowed = torch.randn(1, 7, 2), torch.ones(1, 7, dtype=torch.bool)
    expected = torch.autograd.grad(attend(queries, keys, values, allowed).sin().sum(), [queries, keys])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(attend(queries, keys, values, allowed).sin().sum(), [queries, keys])
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_products_at_the_bounds() -> None:
    """Weights from exp(-80) on keep their ratio in single precision."""
    queries, keys = torch.tensor([[[40.0, 0.0]]]), torch.tensor([[[-1.0, 0.0], [-0.975, 0.0]]])
    answer = streamed_attention(queries, keys, torch.tensor([[[0.0], [1.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert abs(answer.item() - torch.tensor(1.0).sigmoid().item()) < 1e-5
    answer = streamed_attention(queries, -keys, torch.tensor([[[0.0], [1.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert abs(answer.item() - torch.tensor(-1.0).sigmoid().item()) < 1e-5


@pytest.mark.parametrize("length", [64.5, 89.0, 120.0, 1e4])
def test_products_beyond_the_bounds_are_refused(length: float) -> None:
    """From 70 or so on they would give NaN, or weights of a wrong ratio, without a word."""
    long, values, allowed = torch.tensor([[[length, 0.0]]]), torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)
    for short in (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0]]])):
        with pytest.raises(ValueError, match=f"a product of at most 64, got {length:g} and 1"):
            streamed_attention(long, short, values, allowed)
        with pytest.raises(ValueError, match=f"a product of at most 64, got 1 and {length:g}"):
            streamed_attention(short, long, values, allowed)
    assert streamed_attention(long * float("nan"), short, values, allowed).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_products_are_right_both_ways(sign: float) -> None:
    """As many keys as a large image has, coordinates as large as its, and their gradient."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.tensor([[[sign * 8.0, 0.0]]]).requires_grad_()
    keys = torch.stack([8 - torch.rand(200_000, generator=generator) / 10, torch.zeros(200_000)], dim=1)[None]
    values, allowed = 3000 * (8 - keys[..., :1]), torch.ones(1, 200_000, dtype=torch.bool)
    answer = streamed_attention(queries, keys, values, allowed)
    (found,) = torch.autograd.grad(1e3 * answer.sum(), queries)
    exact = queries.detach().double().requires_grad_()
    expected = torch.softmax(exact @ keys.double().mT, dim=2) @ values.double()
    (slope,) = torch.autograd.grad(1e3 * expected.sum(), exact)
    # Single precision knows products of 64 to 4e-6, and the gradient is a small difference of large sums.
    torch.testing.assert_close(answer.double(), expected, rtol=3e-5, atol=0)
    torch.testing.assert_close(found.double(), slope, rtol=1e-2, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e8, 1e25])
def test_features_are_never_longer_than_four(scale: float) -> None:
    """Products lie between -16 and 16 whatever the image is: the bounds hold by construction."""
    net = randomized(CoordinateAttention(2, feature_channels=8, rotation_group="pi")).eval()
    features, _ = net._encode(scale * content(9, 8))
    lengths = features.norm(dim=1)
    assert torch.isfinite(features).all() and lengths.max() <= 4 * (1 + 1e-6)
    # Nothing tells the voxels of too faint an image apart: features less what they share are then nearly zero.
    assert not 1e-20 < scale < 1e20 or lengths.max() > 3.9


def attention_inputs() -> tuple[torch.Tensor, ...]:
    """Return queries, keys, values and allowed keys."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((5, 6), (7, 6), (7, 2))
    vectors = (torch.randn(2, *size, dtype=torch.float64, generator=generator) for size in sizes)
    return *vectors, torch.arange(7).expand(2, 7) % 3 != 1


def test_functional_gradients() -> None:
    *vectors, allowed = attention_inputs()

    def explicit(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        logits = (queries @ keys.mT).masked_fill(~allowed[:, None], float("-inf"))
        return (torch.softmax(logits, dim=2) @ values).square().sum()

    found = torch.func.grad(lambda *given: streamed_attention(*given, allowed).square().sum(), (0, 1, 2))(*vectors)
    for mine, theirs in zip(found, torch.func.grad(explicit, (0, 1, 2))(*vectors)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def second_by_functions(function, queries: torch.Tensor) -> None:
    torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(queries)


def second_by_a_penalty(function, queries: torch.Tensor) -> None:
    """The gradient that comes in is constant: what does not look at its inputs would take the penalty for constant."""
    queries = queries.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(queries), queries, create_graph=True)
    (slope.square().sum() + queries.sum()).backward()


@pytest.mark.parametrize("second", [second_by_functions, second_by_a_penalty])
def test_a_second_derivative_is_an_error(second) -> None:
    queries, keys, values, allowed = attention_inputs()
    with pytest.raises(RuntimeError, match="streamed_attention can be differentiated only once"):
        second(lambda x: streamed_attention(x, keys, values, allowed).sum(), queries)


def test_maps_and_forward_derivatives_are_errors() -> None:
    """They have no rules of their own here; torch says so, and nothing comes out wrong."""
    queries, keys, values, allowed = attention_inputs()

    def function(x: torch.Tensor) -> torch.Tensor:
        return streamed_attention(x, keys, values, allowed)

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(torch.stack([queries, queries]))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.jacrev(function)(queries)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(function, (queries,), (queries,))


# ---- equivariance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dims", "padding", "shape", "at"), CASES)
@pytest.mark.usefixtures("whole_canvas")
@torch.no_grad()
def test_answer_follows_the_moving_content(dims: int, padding: int, shape, at, dtype: torch.dtype) -> None:
    """Also where nothing is cropped: features are those of the content, wherever it lies."""
    net = attention(dims, dtype, padding)
    values, fixed = (
        content(*CONTENT[dims], dtype=dtype),
        place(content(*CONTENT[dims], seed=1, dtype=dtype), *CANVAS[dims]),
    )
    ddf = net(place(values, *CANVAS[dims]), fixed)
    by = [a - b for a, b in zip(at, CANVAS[dims][1])]
    error = (net(place(values, shape, at), fixed) - ddf - vector(by, ddf)).abs().max()
    assert error < TOLERANCE[dtype]
    assert ddf.std(dim=list(range(2, 2 + dims))).min() > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_answer_follows_both_contents_at_any_resolution(dims: int, factor: int, dtype: torch.dtype) -> None:
    """Either content moves by any whole vector onto canvases of other shapes, also where the pooling phase changes."""
    net = Downsample(attention(dims, dtype), factor, content_phase=True)
    one, two = content(*CONTENT[dims], dtype=dtype), content(*CONTENT[dims], seed=1, dtype=dtype)
    # The reference canvas leaves a margin in which the field has reached what it continues with.
    shape, at = CANVAS[dims]
    shape, at = [n + 2 * factor for n in shape], [a + factor for a in at]
    ddf = net(place(one, shape, at), place(two, shape, at))
    assert ddf.abs().max() > 0.3
    for (moving_shape, moving_at), (fixed_shape, fixed_at) in itertools.product(OTHERS[dims][:3], OTHERS[dims][1:]):
        answer = net(place(one, moving_shape, moving_at), place(two, fixed_shape, fixed_at))
        by_moving, by_fixed = ([a - b for a, b in zip(x, at)] for x in (moving_at, fixed_at))
        expected = moved_field(ddf, fixed_shape, by_fixed) + vector(by_moving, ddf) - vector(by_fixed, ddf)
        torch.testing.assert_close(answer, expected, rtol=0, atol=factor * TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.usefixtures("whole_canvas")
def test_a_plain_encoder_fails_this_test(dims: int) -> None:
    net = attention(dims)
    net.encoder = PlainEncoder(net.encoder)
    values, fixed = content(*CONTENT[dims]), place(content(*CONTENT[dims], seed=1), *CANVAS[dims])
    ddf = net(place(values, *CANVAS[dims]), fixed)
    shape, at = OTHERS[dims][0]
    by = [a - b for a, b in zip(at, CANVAS[dims][1])]
    assert (net(place(values, shape, at), fixed) - ddf - vector(by, ddf)).abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("dims", "rotation_group"),
    [(2, "none"), (2, "pi"), (3, "none"), pytest.param(3, "pi", marks=pytest.mark.slow)],
)
def test_crops_change_nothing(dims: int, rotation_group: str, training: bool, request: pytest.FixtureRequest) -> None:
    """Eager mode leaves background away: answers, gradients and running statistics are those of whole canvases."""
    net = randomized(CoordinateAttention(dims, 1, 8, rotation_group=rotation_group), torch.float64).train(training)
    shape = [n + 6 for n in CANVAS[dims][0]]
    sizes = [CONTENT[dims], [n - 1 for n in CONTENT[dims]], CONTENT[dims], [n + 2 for n in CONTENT[dims]]]
    images = [
        place(content(*size, seed=k, dtype=torch.float64), shape, [k + axis for axis in range(dims)])
        for k, size in enumerate(sizes)
    ]
    moving, fixed = torch.cat(images[:2]), torch.cat(images[2:])
    found = []
    for _ in range(2):
        copied = copy.deepcopy(net)
        ddf, ddf_back = copied.both(moving, fixed)
        one = copied.eval()(moving, fixed)
        (ddf.sin().sum() + ddf_back.cos().sum() + one.sin().sum()).backward()
        found.append([ddf, ddf_back, one, *(p.grad for p in copied.parameters()), *copied.buffers()])
        request.getfixturevalue("whole_canvas")
    for crop, whole in zip(*found):
        torch.testing.assert_close(crop, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dims", [2, 3])
def test_field_depends_on_what_the_content_is(dims: int) -> None:
    """Permuting its values keeps box, mass and histogram, and changes the answer."""
    net, values = attention(dims), content(*CONTENT[dims])
    fixed = place(content(*CONTENT[dims], seed=1), *CANVAS[dims])
    permuted = values.flatten()[torch.randperm(values.numel())].reshape(values.shape)
    one, two = (net(place(v, *CANVAS[dims]), fixed) for v in (values, permuted))
    assert (one - two).abs().max() > 0.4


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = attention(2)
    moving = torch.cat(
        [place(content(6, 7, seed=s), (16, 15), at) for s, at in [(0, (0, 8)), (1, (9, 3)), (2, (1, 1))]]
    )
    fixed = torch.cat(
        [place(content(8, 5, seed=s), (13, 17), at) for s, at in [(3, (5, 0)), (4, (0, 12)), (5, (4, 4))]]
    )
    moving[1] = 0.0
    alone = torch.cat([net(m[None], f[None]) for m, f in zip(moving, fixed)])
    together = net(moving, fixed)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[1] == 0).all() and (together[0] != 0).any()


def test_outside_the_fixed_content_the_nearest_displacement_continues() -> None:
    ddf = attention(2)(place(content(6, 7), (16, 15), (2, 2)), place(content(6, 7), (16, 15), (5, 4)))
    index = [torch.arange(16).clamp(5, 10), torch.arange(15).clamp(4, 10)]
    assert torch.equal(ddf, ddf[:, :, index[0]][:, :, :, index[1]])


@pytest.mark.parametrize("training", [False, True])
def test_both_directions(training: bool) -> None:
    net = attention(2).train(training)
    fresh = copy.deepcopy(net)
    one, two = place(content(6, 7), (14, 15), (2, 5)), place(content(8, 6, seed=1), (14, 15), (4, 0))
    there, back = net.both(one, two)
    if training:  # batch statistics of both images: as encoding the two as one batch
        batch = fresh(torch.cat([one, two]), torch.cat([two, one]))
        torch.testing.assert_close(torch.cat([there, back]), batch, rtol=0, atol=1e-5)
        assert (there - fresh(one, two)).abs().max() > 1e-3  # statistics of one image at a time are others
    else:
        assert torch.equal(there, net(one, two)) and torch.equal(back, net(two, one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"spatial_dims": 2.0}, "spatial_dims must be 2 or 3, got 2.0"),
        ({"spatial_dims": "2"}, "spatial_dims must be 2 or 3, got '2'"),
        ({"spatial_dims": 2, "in_channels": 0}, "got 0, 128 and 2"),
        ({"spatial_dims": 2, "feature_channels": 8.0}, "got 1, 8.0 and 2"),
        ({"spatial_dims": 2, "padding": None}, "got 1, 128 and None"),
        ({"spatial_dims": 3, "feature_channels": 2}, "got 1, 2 and 2"),
        ({"spatial_dims": 3, "padding": -1}, "got 1, 128 and -1"),
    ],
)
def test_attention_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateAttention(**arguments)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_graphs_stay_on_the_kernel_with_linear_memory(spatial_dims: int) -> None:
    net = CoordinateAttention(spatial_dims, 1, 16)
    images = torch.rand(2, 2, 1, *[6] * spatial_dims)
    scripted = torch.jit.script(net)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the fused kernel cannot serve
        scripted(images[0], images[1]).sum().backward()


@pytest.mark.parametrize("function", [_attend, streamed_attention])
def test_memory_is_linear(function) -> None:
    """No tensor of as many elements as there are products is ever made, forward or backward."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            answer = func(*args, **(kwargs or {}))
            made = [t for t in (answer if isinstance(answer, (tuple, list)) else [answer]) if torch.is_tensor(t)]
            self.elements = max([self.elements, *(t.numel() for t in made)])
            return answer

    queries, keys = torch.randn(1, 2000, 16, requires_grad=True), torch.randn(1, 3000, 16, requires_grad=True)
    with Largest() as largest:
        function(queries, keys, torch.randn(1, 3000, 3), torch.ones(1, 3000, dtype=torch.bool)).sum().backward()
    assert 48_000 <= largest.elements <= 512 * 1024
