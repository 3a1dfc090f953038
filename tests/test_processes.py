"""Several processes that train and evaluate together: as one process with the whole batch, equal, and never hanging."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import worker_processes
from helpers_bundle import SIZES, TINY_TRAINING, files, inside_bundle, random_network, random_weights, run
from helpers_networks import content, randomized
from ignite.engine import Engine
from monai.transforms import RandAxisFlip
from torch import nn

from equireg.handlers import EpochSeed
from equireg.networks import CARL
from equireg.networks.statistics import BatchNorm, set_batch_statistics

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")
# Each process draws flips for itself, and a loader without a generator of its own draws from that of the loss's noise.
# Adam turns the rounding in the gradient of a bias before batch normalization, which is zero, into steps of full size.
SGD = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 1e-4}
ALIKE = {"train#random_transforms": [], "train#dataloader#generator": "$torch.Generator()", "optimizer": SGD}
SMALL = {**TINY_TRAINING, **SIZES[2], "epochs": 2, "iterations": 3, "val_pairs": 3, **ALIKE}
LOSS, METRIC = 1e-5, 1e-4
FROZEN = {"batch_statistics": "frozen"}
MODES = ("synchronized", "frozen", "local")


@pytest.fixture(autouse=True)
def bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from inside_bundle(root, monkeypatch)


def environment() -> dict[str, str]:
    """Return that of a process which finds this `equireg` and the bundle's `scripts`."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(*words: str, count: int = 2) -> subprocess.CompletedProcess:
    """Run a Python program in several processes, as `torchrun` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def job(name: str, *configs: str, kind: str = "training", **options: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "configs": files(*configs), "options": {**SMALL, **options}}


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run each job once, in one process (here) or in two; return the folder with what they wrote and saw."""
    folder = tmp_path_factory.mktemp("ranks")
    weights = str(random_weights(folder / "weights.pt", 2))
    alone = [
        job("one_local", "train", batch_size=2),
        job("one_frozen", "train", batch_size=2, batch_statistics="frozen"),
    ]
    alone.append(job("one_evaluation", "train", "evaluate", kind="evaluation", weights=weights))
    together = [job(mode, "train", "multi_gpu_train", batch_statistics=mode, tensorboard=True) for mode in MODES]
    together.append(job("evaluation", "train", "evaluate", "multi_gpu_evaluate", kind="evaluation", weights=weights))
    for name, jobs in (("alone", alone), ("together", together)):
        (folder / f"{name}.json").write_text(json.dumps(jobs))
    with pytest.MonkeyPatch.context() as patch:
        generator = inside_bundle(root, patch)
        next(generator)
        worker_processes.main(str(folder / "alone.json"), str(folder))
        torchrun(worker_processes.__file__, str(folder / "together.json"), str(folder))
        next(generator, None)
    return folder


def saw(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what the processes of a job saw, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_rank?.json"))]


# ---- training


@pytest.mark.parametrize(("mode", "alone"), [("synchronized", "one_local"), ("frozen", "one_frozen")])
def test_two_processes_train_as_one_with_the_doubled_batch(mode: str, alone: str, folder: Path) -> None:
    (one,), (first, second) = saw(folder, alone), saw(folder, mode)
    together = [(a["loss"] + b["loss"]) / 2 for a, b in zip(first["steps"], second["steps"])]
    assert together == pytest.approx([step["loss"] for step in one["steps"]], rel=LOSS)
    assert len(together) == 6 and max(together) - min(together) > 1e-2
    assert first["metrics"] == second["metrics"] == pytest.approx(one["metrics"], rel=METRIC)
    states = [torch.load(folder / f"{name}_written_by_0" / "checkpoint.pt")["model"] for name in (alone, mode)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)


def test_local_statistics_train_otherwise(folder: Path) -> None:
    """The comparison above can fail."""
    (one,), (first, second) = saw(folder, "one_local"), saw(folder, "local")
    apart = [
        abs((a["loss"] + b["loss"]) / 2 - c["loss"]) for a, b, c in zip(*(r["steps"] for r in (first, second, one)))
    ]
    assert max(apart) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_equal_on_both_processes_after_every_step(mode: str, folder: Path) -> None:
    first, second = saw(folder, mode)
    parameters = [step["parameters"] for step in first["steps"]]
    assert parameters == [step["parameters"] for step in second["steps"]]
    assert len(set(parameters)) == 6  # it trains
    assert [a["loss"] for a in first["steps"]] != [b["loss"] for b in second["steps"]]  # on pairs of their own
    same = [a["buffers"] == b["buffers"] for a, b in zip(first["steps"], second["steps"])]
    assert same == [mode != "local"] * 6  # where torch sends those of the first process ahead of the next step
    assert (len({step["buffers"] for step in first["steps"]}) == 1) == (mode == "frozen")


@pytest.mark.parametrize("mode", MODES)
def test_one_process_writes(mode: str, folder: Path) -> None:
    names = {path.name.split(".")[0] for path in (folder / f"{mode}_written_by_0").iterdir()}
    assert names == {"checkpoint", "model", "events"} and not (folder / f"{mode}_written_by_1").exists()
    state = torch.load(folder / f"{mode}_written_by_0" / "checkpoint.pt", weights_only=True)["model"]
    random_network(2).load_state_dict(state)  # names as in one process


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_no_thread_outlives_the_process_group(folder: Path) -> None:
    """A thread of gloo that is left at the end of a process aborts it, now and then."""
    for rank in range(2):
        before, after = json.loads((folder / f"threads_of_{rank}.json").read_text())
        assert before > 0 and after == 0


def test_one_process_goes_on_where_two_stopped(folder: Path, tmp_path: Path) -> None:
    source = folder / "synchronized_written_by_0" / "checkpoint.pt"
    (tmp_path / "checkpoint.pt").write_bytes(source.read_bytes())
    run("training", "train", **{**SMALL, "epochs": 3, "batch_size": 2, "output_dir": str(tmp_path), "resume": True})
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] == 9


# ---- evaluation


def test_shared_evaluation_measures_as_one_process(folder: Path) -> None:
    (one,), (first, second) = saw(folder, "one_evaluation"), saw(folder, "evaluation")
    assert (first["evaluated"], second["evaluated"]) == (2, 1)  # of three pairs
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert len(one["metrics"]) == 6 and 0 < one["metrics"]["val_mean_dice"] < 1
    tables = [folder / f"{name}_written_by_0" / "val_folding_raw.csv" for name in ("one_evaluation", "evaluation")]
    alone, together = ([line.split(",")[1:] for line in path.read_text().splitlines()] for path in tables)
    assert sorted(alone) == sorted(together) and len(alone) == 4
    assert not (folder / "evaluation_written_by_1").exists()


# ---- a process that dies or stops


def process(rank: int, port: int, output_dir: Path, **options: Any) -> subprocess.Popen:
    """Start one of two processes by hand, with nobody to end the other."""
    overrides = {**TINY_TRAINING, **SIZES[2], "iterations": 100_000, "output_dir": str(output_dir), **options}
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += ["--config_file", str(files("train", "multi_gpu_train")), *(f"--{k}={v}" for k, v in overrides.items())]
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**environment(), **{name: str(value) for name, value in world.items()}}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "killed"), [("KILL", 0), ("KILL", 1), ("STOP", 1)])
def test_the_other_process_ends_with_an_error(how: str, killed: int, tmp_path: Path) -> None:
    """In an epoch that would take hours; a process that is alive but stuck costs the timeout."""
    port = free_port()
    processes = [process(rank, port, tmp_path, tensorboard=True, timeout=10) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 1000 for path in tmp_path.glob("events.*")):  # steps are being made
            assert time.monotonic() < deadline and all(one.poll() is None for one in processes)
            time.sleep(0.2)
        processes[killed].send_signal(getattr(signal, f"SIG{how}"))
        survivor = processes[1 - killed]
        _, errors = survivor.communicate(timeout=60)
        assert survivor.returncode > 0 and "Error" in errors
    finally:
        for one in processes:
            one.kill()


# ---- norms


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["local", "synchronized"])
def test_batch_norm_is_torchs(mode: str, dims: int) -> None:
    theirs = getattr(nn, f"BatchNorm{dims}d")(3).double()
    ours = set_batch_statistics(BatchNorm(3).double(), mode)
    outputs = []
    for norm in (theirs, ours):
        torch.manual_seed(0)
        image = (5 + torch.randn((2, 3, 6, 5, 4)[: dims + 2], dtype=torch.float64)).requires_grad_()
        answer = norm.train()(image)
        (answer**3).sum().backward()
        outputs.append([answer, image.grad, norm.weight.grad, *norm.state_dict().values(), norm.eval()(image)])
    for a, b in zip(*outputs):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


def test_frozen_statistics_stay_while_everything_else_trains() -> None:
    net = set_batch_statistics(randomized(CARL(2, feature_channels=4, refinement_channels=(4,), padding=1)), "frozen")
    before = {name: value.clone() for name, value in net.named_buffers()}
    moving, fixed = content(16, 16), content(16, 16, seed=1)
    answer = net.train()(moving, fixed)
    torch.testing.assert_close(answer, net.eval()(moving, fixed))
    answer.square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers()) and len(before) > 9
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_statistics_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="one of local, synchronized, frozen, got 'none'"):
        set_batch_statistics(BatchNorm(2), "none")
    with pytest.raises(ValueError, match="'1' is torch's BatchNorm2d, whose statistics cannot be frozen"):
        set_batch_statistics(nn.Sequential(BatchNorm(2), nn.BatchNorm2d(2)), "frozen")


def test_processes_augment_each_in_its_own_way_and_draw_one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        transform = RandAxisFlip(prob=0.5)
        seed, trainer = EpochSeed(seed=3, transform=transform), Engine(lambda engine, batch: None)
        seed.attach(trainer)
        trainer.run([0], max_epochs=1)
        drawn.append((torch.rand(1).item(), transform.R.rand()))
    assert drawn[0][0] == drawn[1][0] and drawn[0][1] != drawn[1][1]
