"""The one-tensor adapter: what hosts get in eval and train mode, scripted and traced."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers_networks import SMALL, content, place, randomized
from torch import nn
from torch.utils.data import DataLoader, Dataset

from equireg.fields import warp
from equireg.networks import CARL, DisplacementUNet, PairNetwork
from equireg.networks.carl import NESTINGS


def pair_network(dims: int, nesting: str = "deck", channels: int = 1, two_way: bool = True) -> PairNetwork:
    return PairNetwork(randomized(CARL(dims, channels, nesting=nesting, **SMALL)), two_way).eval()


def stacked(shape: tuple[int, ...], seed: int = 0, channels: int = 1, batch: int = 1) -> torch.Tensor:
    """A pair whose contents lie apart, each sample's at places of its own."""
    samples = []
    generator = torch.Generator().manual_seed(seed)
    for k in range(batch):
        images = []
        for part in (0, 1):
            size = [n // 2 + 1 for n in shape]
            at = [int(torch.randint(0, n - s + 1, (1,), generator=generator)) for n, s in zip(shape, size)]
            images.append(place(content(*size, seed=100 * seed + 10 * k + part, channels=channels), shape, at))
        samples.append(torch.cat(images, dim=1))
    return torch.cat(samples)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("dims", "shape"), [(2, (21, 18)), (3, (10, 11, 9))])
def test_eval_layout(dims: int, shape: tuple[int, ...], channels: int) -> None:
    network, image = pair_network(dims, channels=channels), stacked(shape, channels=channels, batch=2)
    moving, fixed = image[:, :channels], image[:, channels:]
    pred = network(image)
    assert pred.shape == (2, dims + channels, *shape)
    ddf = network.net(moving, fixed)
    assert torch.equal(pred[:, :dims], ddf)
    assert torch.equal(pred[:, dims:], warp(moving, ddf, padding="zeros"))
    assert (ddf != 0).any()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("dims", "shape"), [(2, (21, 18)), (3, (10, 11, 9))])
def test_train_layout(dims: int, shape: tuple[int, ...], channels: int) -> None:
    """Both directions, each a ddf and a warped image, from the same weights and running statistics."""
    network, image = pair_network(dims, channels=channels).train(), stacked(shape, channels=channels, batch=2)
    network.net.eval()  # without batch statistics the two modes are comparable
    moving, fixed = image[:, :channels], image[:, channels:]
    pred = network(image)
    assert pred.shape == (2, 2 * (dims + channels), *shape)
    ddf, moved, ddf_back, moved_back = pred.split([dims, channels, dims, channels], dim=1)
    assert torch.equal(ddf, network.net(moving, fixed))
    assert torch.equal(moved, warp(moving, ddf, padding="zeros"))
    assert torch.equal(ddf_back, network.net(fixed, moving))
    assert torch.equal(moved_back, warp(fixed, ddf_back, padding="zeros"))


def test_carried_channels_are_moved_and_not_seen() -> None:
    network, image = pair_network(2).train(), stacked((21, 18), channels=3)
    network.net.eval()
    network.carried_channels = 2
    moving, fixed = image[:, :3], image[:, 3:]
    ddf, moved, ddf_back, moved_back = network(image).split([2, 3, 2, 3], dim=1)
    assert torch.equal(ddf, network.net(moving[:, :1], fixed[:, :1])) and (ddf != 0).any()
    assert torch.equal(moved, warp(moving, ddf, padding="zeros"))
    assert torch.equal(moved_back, warp(fixed, ddf_back, padding="zeros"))
    alone = torch.cat([moving[:, :1], fixed[:, :1]], dim=1)
    assert torch.equal(network.eval()(alone)[:, :2], ddf)  # once trained, an image comes without labels
    with pytest.raises(ValueError, match="carried_channels must be at least 0, got -1"):
        PairNetwork(network.net, carried_channels=-1)


def test_one_way_training_and_networks_without_both() -> None:
    network, image = pair_network(2, two_way=False).train(), stacked((16, 17))
    assert network(image).shape == (1, 3, 16, 17)
    network = PairNetwork(randomized(DisplacementUNet(2, 1, (4, 8)))).train()
    assert network(image).shape == (1, 6, 16, 17)
    network(image).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


class Registering(Dataset):
    """A dataset that registers: its network goes to worker processes with it."""

    def __init__(self, network: PairNetwork, images: torch.Tensor) -> None:
        self.network, self.images = network, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.network(self.images[index : index + 1])[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("dims", [2, 3])
def test_copies_after_a_step_answer_the_same_and_are_independent(dims: int, copied) -> None:
    network, image = pair_network(dims), stacked((12, 13, 11)[:dims])
    network.train()(image).sum().backward()
    twin = copied(network)
    with torch.no_grad():
        expected = network.eval()(image)
        assert torch.equal(twin.eval()(image), expected)
        for parameter in twin.parameters():
            parameter.add_(1.0)
        assert torch.equal(network(image), expected)


def test_workers_that_are_spawned_get_the_network() -> None:
    network, images = pair_network(2), stacked((16, 17), batch=2)
    network.train()(images).sum().backward()
    dataset = Registering(network.eval(), images)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    (found,) = loader
    torch.testing.assert_close(found, torch.stack([dataset[0], dataset[1]]), rtol=0, atol=1e-5)


# Graphs attend on whole canvases by torch's kernel, eager mode on the content in blocks: sums in another order.
# A traced graph also keeps the sizes of grids in single precision.
EXPORTED = {torch.float32: 5e-5, torch.float64: 1e-5}  # voxels; measured: 1.5e-5 and 6e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", EXPORTED, ids=str)
@pytest.mark.parametrize("form", ["scripted", "traced"])
@pytest.mark.parametrize(
    ("nesting", "dims", "shape", "other"),
    [*((nesting, 2, (21, 18), (33, 29)) for nesting in NESTINGS), ("deck", 3, (10, 9, 12), (13, 14, 7))],
)
def test_exported_equals_eager(nesting: str, dims: int, shape, other, form: str, dtype, tmp_path) -> None:
    """With content elsewhere, on another shape, with a batch of two, and after saving and loading."""
    network, example = pair_network(dims, nesting).to(dtype), stacked(shape).to(dtype)
    exported = compile_as(form, network, example)
    torch.jit.save(exported, tmp_path / "network.ts")
    exported = torch.jit.load(tmp_path / "network.ts")
    images = [example, stacked(shape, seed=3), stacked(other, seed=4), stacked(other, seed=5, batch=2)]
    images.append(torch.cat([images[-1], torch.zeros_like(images[-1])]))
    for image in images:
        image = image.to(dtype)
        torch.testing.assert_close(exported(image), network(image), rtol=0, atol=EXPORTED[dtype])


@torch.no_grad()
@pytest.mark.parametrize("nesting", ["deck", "left"])
def test_traced_takes_axes_of_one_voxel(nesting: str) -> None:
    network = pair_network(3, nesting)
    exported = compile_as("traced", network, stacked((10, 9, 12)))
    for seed, shape in enumerate([(1, 9, 8), (9, 8, 1)]):
        image = content(*shape, seed=seed, channels=2)
        expected = network(image)
        torch.testing.assert_close(exported(image), expected, rtol=0, atol=1e-5)
        assert expected[:, :3].abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("channel", "name"), [(0, "moving"), (1, "fixed")])
def test_values_that_are_not_finite_are_refused(channel: int, name: str, training: bool) -> None:
    network, image = pair_network(2).train(training), stacked((16, 17), batch=2)
    image[1, channel, 3, 4] = float("nan")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"the {name} image must be finite"):
        network(image)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def compile_as(form: str, network: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    if form == "scripted":
        return torch.jit.script(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of shapes, which hold for other shapes too
        return torch.jit.trace(network, example, check_trace=False)


def test_scripted_refuses_as_eager_does() -> None:
    scripted = torch.jit.script(pair_network(2))
    with pytest.raises(Exception, match=r"expected a stacked pair \(B, 2C, \*spatial\).* got \[1, 3, 8, 8\]"):
        scripted(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 8, 8), (2, 8)])
def test_odd_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a stacked pair \(B, 2C, \*spatial\) with moving and fixed ch"):
        pair_network(2)(torch.rand(shape))


def test_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the moving image must have 1 channel\(s\), got 2"):
        pair_network(2)(torch.rand(1, 4, 8, 8))


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    """Convolutions run in half precision, and answers are float32 and close; the network inside knows nothing of it."""
    network, image = pair_network(2).train(training), stacked((21, 18))
    network.net.eval()
    half = PairNetwork(network.net, autocast="bfloat16").train(training)
    half.net.eval()
    used: list[torch.dtype] = []
    handle = network.net.steps.second.head.register_forward_hook(lambda _, __, answer: used.append(answer.dtype))
    expected, answer = network(image), half(image)
    handle.remove()
    directions = 2 if training else 1
    assert used == [torch.float32] * directions + [torch.bfloat16] * directions
    assert answer.dtype == torch.float32 and answer.shape == expected.shape
    assert 0 < (answer - expected)[:, :2].abs().mean() < 0.3
    with pytest.raises(ValueError, match="autocast must be 'bfloat16' or empty, got 'half'"):
        PairNetwork(network.net, autocast="half")
