"""Time and memory: networks beside the published code, against the number of voxels and in training; fields; volumes.

    pip install matplotlib && pip install --no-deps icon-registration==1.1.9 footsteps
    python bundle/docs/benchmarks/benchmark.py every

Every measurement is a process of its own that does one thing and tells how long it took and what memory it had at most.
What is compared runs in turns (A B A B): operations on fields and the floor they contain within one process. Rows are
added to a file, which is read again: a run that was cut off goes on.
Without `icon-registration` its rows are left out.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import fire
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn

from equireg.batch import write_table
from equireg.fields import compose, identity_grid, invert, jacobian_determinant, resize, warp
from equireg.images import write_image
from equireg.inferer import RegistrationInferer
from equireg.networks import CARL, PairNetwork
from equireg.networks.attention import CoordinateAttention
from equireg.networks.encoder import Encoder
from equireg.networks.refinement import DisplacementUNet

HERE = Path(__file__).resolve().parent
SIZES = (48, 64, 80, 96, 121, 152, 175)  # voxels along an axis, from one to the next about twice as many in all
STEPS = ((196, 141), (64, 64, 64))
FIELDS = ((64, 64, 64), (96, 96, 96), (160, 160, 160), (512, 512))
TURNS = 15  # of an operation and its floor
VOLUME = (512, 512, 300)
PUBLISHED = {  # the published network's layers
    "in_channels": 1,
    "feature_channels": 128,
    "nesting": "right",
    "factor": 4,
    "refinement_channels": (16, 32, 64, 256, 512),
}


def peak(who: int = resource.RUSAGE_SELF) -> float:
    """Return the most memory this process, or one that it started, has had, MB."""
    return resource.getrusage(who).ru_maxrss / 1024


def images(shape: tuple[int, ...], batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two images that are full of content, `(B, 1, *shape)` each."""
    generator = torch.Generator().manual_seed(0)
    moving, fixed = (0.1 + torch.rand(2, batch, 1, *shape, generator=generator)).unbind()
    return moving, fixed


def yardstick(size: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Return the published network for cubes, made to run without a GPU: of what it does nothing is changed."""
    nn.Module.cuda = lambda self, *_: self
    torch.backends.cuda.sdp_kernel = lambda *_, **__: contextlib.nullcontext()
    from icon_registration import carl  # type: ignore[import-not-found]

    network = carl.make_network_final((1, 1, size, size, size), 3).eval().regis_net
    return lambda moving, fixed: network(moving, fixed)(network.identity_map)


def timed(run: Callable[[], Any]) -> dict[str, Any]:
    """Run something once and tell how long it took, and the memory before and at most."""
    start, begin = peak(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - begin, "start_mb": start, "peak_mb": peak()}


def processor_seconds(run: Callable[[], Any]) -> float:
    """Run something once and tell the processor's time, of all threads: pauses for other programs do not count."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


@torch.inference_mode()
def forward(network: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Register one pair in one direction; memory counts from the network's being there."""
    net: Callable[..., Any]
    if network == "published":
        net = yardstick(shape[0])
    else:
        net = CARL(len(shape), **PUBLISHED).eval()
    if network == "equireg bfloat16":
        net = PairNetwork(net, autocast="bfloat16").eval()._register
    pair = images(shape)
    return timed(lambda: net(*pair))


@torch.inference_mode()
def part(network: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Register a pair through the inferer, the canvas full of content or half of it empty."""
    inferer, net = RegistrationInferer(), PairNetwork(CARL(len(shape), **PUBLISHED)).eval()
    pair = torch.cat(images(shape), dim=1)
    if network == "half":
        pair[..., : shape[-1] // 2] = 0
    return timed(lambda: inferer(pair, net))


def step(network: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Take the second of two training steps in both directions, with the seconds of its parts."""
    net = CARL(len(shape), **PUBLISHED, padding=9 if network == "plain" else 2)
    pair = images(shape, batch=4 if len(shape) == 2 else 1)

    def run() -> None:
        answers = (net(*pair), net(*pair[::-1])) if network == "plain" else adapter._register(*pair)
        sum(answer.square().mean() for answer in answers).backward()

    adapter = PairNetwork(net, autocast="bfloat16" if network.endswith("bfloat16") else "")
    first = timed(run)
    result = {**timed(run), "start_mb": first["start_mb"]}
    return {**result, "shares": shares(net, run) if network == "equireg" else {}}


def shares(net: nn.Module, run: Callable[[], None]) -> dict[str, float]:
    """Return the seconds of a step's parts, each run again alone, forward and backward, on what it got in the step."""
    calls: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = []
    hooks = [
        module.register_forward_pre_hook(lambda owner, inputs: calls.append((owner, inputs)))
        for module in net.modules()
        if isinstance(module, (Encoder, DisplacementUNet))
    ]
    stage = next(module for module in net.modules() if isinstance(module, CoordinateAttention))
    both, pairs = stage.both, []
    stage.both = lambda *pair: (pairs.append(pair), both(*pair))[1]  # type: ignore[method-assign]
    run()
    for hook in hooks:
        hook.remove()
    seconds = {"encoder": 0.0, "U-Nets": 0.0}
    for module, inputs in calls:
        name = "encoder" if isinstance(module, Encoder) else "U-Nets"
        seconds[name] += backward(module, tuple(t.detach() for t in inputs))
    return {**seconds, "attention": backward(both, pairs[0]) - seconds["encoder"]}


def backward(net: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the seconds of calling a network, of one answer or two, and of the way back."""

    def run() -> None:
        answers = net(*inputs)
        sum(a.square().mean() for a in (answers if isinstance(answers, tuple) else (answers,))).backward()

    return timed(run)["seconds"]


@torch.inference_mode()
def operation(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Take the processor's time of an operation on a smooth field, in turns with that of the floor that it contains.

    That is `grid_sample` with a ready grid (warp of one channel; compose; invert, in two iterations), `interpolate`
    (resize, by 4), and for the determinant of the Jacobian a copy that reads and writes as many bytes as the field and
    the answer have together.
    """
    dims, generator = len(shape), torch.Generator().manual_seed(0)
    ddf = resize(0.4 * torch.randn(1, dims, *[n // 8 for n in shape], generator=generator), 8)
    image, coarse = torch.rand(1, 1, *shape, generator=generator), ddf[(..., *[slice(None, None, 4)] * dims)].clone()
    scale = torch.tensor([2.0 / n for n in shape]).reshape(dims, *[1] * dims)
    grid = ((identity_grid(list(shape)) + ddf + 0.5) * scale - 1.0).flip(1).movedim(1, -1).contiguous()
    mode = "bilinear" if dims == 2 else "trilinear"
    moved_bytes = ddf.flatten()[: (dims + 1) * image.numel() // 2]

    def sampled(values: torch.Tensor, padding: str) -> torch.Tensor:
        return F.grid_sample(values, grid, padding_mode=padding, align_corners=False)

    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "warp": (lambda: warp(image, ddf, padding="zeros"), lambda: sampled(image, "zeros")),
        "compose": (lambda: compose(ddf, ddf), lambda: sampled(ddf, "border")),
        "invert": (lambda: invert(ddf, iterations=2), lambda: (sampled(ddf, "border"), sampled(ddf, "border"))),
        "resize": (lambda: resize(coarse, 4), lambda: F.interpolate(coarse, scale_factor=4.0, mode=mode)),
        "jacobian": (lambda: jacobian_determinant(ddf), moved_bytes.clone),
        "forward jacobian": (lambda: jacobian_determinant(ddf, "forward"), moved_bytes.clone),
    }
    begin, turns = peak(), [[processor_seconds(run) for run in runs[name]] for _ in range(TURNS + 1)][1:]
    ratios = sorted(mine / floor for mine, floor in turns)
    shares = {"floor, ms": 1e3 * median(floor for _, floor in turns), "ratio": median(ratios)}
    shares |= {"least": ratios[0], "most": ratios[-1]}
    return {"seconds": median(mine for mine, _ in turns), "start_mb": begin, "peak_mb": peak(), "shares": shares}


def register(network: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Register made-up CT volumes of 0.8 x 0.8 x 1 mm by the command, at a coarser spacing; content fills half of them.

    Seconds and memory are those of the command as a whole.
    """
    generator = torch.Generator().manual_seed(0)
    small = [-(-n // 8) for n in shape]
    noise = resize(200.0 * torch.randn(1, 1, *[-(-n // 2) for n in small], generator=generator), 2)
    noise = noise[(..., *[slice(n) for n in small])]
    shift = resize(torch.randn(1, len(shape), *[-(-n // 8) for n in small], generator=generator), 8)
    ellipsoid = sum(torch.linspace(-1, 1, n).reshape(-1, *[1] * k).square() for n, k in zip(shape, (2, 1, 0)))
    with tempfile.TemporaryDirectory() as folder:
        for name, texture in (("moving", noise), ("fixed", warp(noise, shift[(..., *[slice(n) for n in small])]))):
            full = F.interpolate(texture, size=shape, mode="trilinear")[0]
            image = torch.where(ellipsoid < 0.97, full.clamp(-900, 2000), -1024.0).to(torch.int16)
            write_image(
                MetaTensor(image, affine=torch.diag(torch.tensor([0.8, 0.8, 1.0, 1.0]))), f"{folder}/{name}.nii.gz"
            )
        files = [f"--{name}={folder}/{name}.nii.gz" for name in ("moving", "fixed")]
        command = [sys.executable, "-m", "equireg", "register", *files, f"--output={folder}/out", "--background=-1024"]
        command.append("--weights=hippocampus")
        found = timed(lambda: subprocess.run([*command, f"--spacing={network}"], check=True, capture_output=True))
        seconds = json.loads(Path(f"{folder}/out/report.json").read_text())["seconds"]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    shares = {**seconds, "processor": usage.ru_utime + usage.ru_stime}  # what other work beside it hardly changes
    return {**found, "peak_mb": peak(resource.RUSAGE_CHILDREN), "start_mb": 0.0, "shares": shares}


def start(network: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Start a command or import a package, in a process of its own."""
    command = {
        "import equireg": ["-c", "import equireg"],
        "import monai": ["-c", "import monai"],
        "equireg --help": ["-m", "equireg", "--help"],
    }[network]
    return timed(lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True))


KINDS = {
    "forward": forward,
    "part": part,
    "step": step,
    "operation": operation,
    "register": register,
    "start": start,
}
OPERATIONS = ("warp", "compose", "invert", "resize", "jacobian", "forward jacobian")


def cases(with_yardstick: bool, runs: int) -> list[tuple[str, str, tuple[int, ...], int]]:
    """List the measurements: kind, network, shape, and the number of the run."""
    listed: list[tuple[str, str, tuple[int, ...], int]] = []
    for run in range(runs):
        for size in (64, 96):
            if with_yardstick:
                listed.append(("forward", "published", (size,) * 3, run))
        for size in SIZES:
            listed.append(("forward", "equireg", (size,) * 3, run))
        listed += [("forward", "equireg bfloat16", (size,) * 3, run) for size in (64, 96)]
        listed += [("part", network, (size,) * 3, run) for size in (96, 152) for network in ("full", "half")]
        for shape in STEPS:
            listed += [("step", network, shape, run) for network in ("plain", "equireg", "equireg bfloat16")]
        if run == 0:  # has its turns within
            listed += [("operation", name, shape, run) for shape in FIELDS for name in OPERATIONS]
        listed += [("register", "4", VOLUME, run)]
        listed += [("start", network, (), run) for network in ("import equireg", "import monai", "equireg --help")]
    return listed


def one(kind: str, network: str, shape: str = "") -> None:
    """Measure one thing in this process and print the result.

    Args:
        kind: "forward", "part", "step", "operation", "register" or "start".
        network: what is measured; for "register" the spacing at which the network sees the images, millimeters.
        shape: of the images, voxels, such as 196x141.
    """
    print(json.dumps(KINDS[kind](network, tuple(map(int, shape.split("x"))) if shape else ())))


def machine(threads: int) -> str:
    """Say what the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {threads} threads, torch {torch.__version__}"


def every(
    runs: int = 3,
    threads: int = 2,
    results: str = str(HERE / "data" / "benchmark.csv"),
    output_dir: str = "",
    kinds: str | tuple[str, ...] = tuple(KINDS),
) -> None:
    """Measure what the results file does not have yet, print the table and draw the curves.

    Args:
        runs: how often everything is measured.
        threads: of torch.
        results: CSV file, read and added to.
        output_dir: where the figure goes; among the documentation's if empty.
        kinds: what is measured, see `one`; everything if left out.
    """
    path = Path(results)
    rows: list[dict[str, str]] = read(path)
    known = {(row["kind"], row["network"], row["shape"], row["run"]) for row in rows}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for kind, network, shape, run in cases(importlib.util.find_spec("icon_registration") is not None, runs):
        row = {"kind": kind, "network": network, "shape": "x".join(map(str, shape)), "run": str(run)}
        if tuple(row.values()) in known or kind not in kinds:
            continue
        command = [sys.executable, __file__, "one", kind, network, row["shape"]]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        row |= {key: f"{found[key]:.4g}" for key in ("seconds", "peak_mb", "start_mb")}
        row |= {"shares": "; ".join(f"{k} {v:.3f}" for k, v in found.get("shares", {}).items())}
        rows.append({**row, "machine": machine(threads)})
        write_table(rows, path)
        print(kind, network, shape, run, row["seconds"], file=sys.stderr)
    table(rows)
    draw(rows, output_dir)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """Return the rows of each kind, network and shape."""
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["network"], row["shape"]), []).append(row)
    return found


def medians(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return the median seconds and the median memory over the start, MB, of each kind, network and shape."""
    return {
        key: (
            median(float(row["seconds"]) for row in group),
            median(float(row["peak_mb"]) - float(row["start_mb"]) for row in group),
        )
        for key, group in groups(rows).items()
    }


RATIOS = (  # what is said, the kind, and what is compared by network and shape
    ("forward at 64^3, equireg / published", "forward", ("equireg", "64x64x64"), ("published", "64x64x64")),
    ("forward at 96^3, equireg / published", "forward", ("equireg", "96x96x96"), ("published", "96x96x96")),
    ("forward at 96^3, bfloat16 / float32", "forward", ("equireg bfloat16", "96x96x96"), ("equireg", "96x96x96")),
    ("152^3 / 121^3", "forward", ("equireg", "152x152x152"), ("equireg", "121x121x121")),
    ("content in half / in all of 96^3", "part", ("half", "96x96x96"), ("full", "96x96x96")),
    ("content in half / in all of 152^3", "part", ("half", "152x152x152"), ("full", "152x152x152")),
    ("step in 2D, equireg / plain", "step", ("equireg", "196x141"), ("plain", "196x141")),
    ("step in 3D, equireg / plain", "step", ("equireg", "64x64x64"), ("plain", "64x64x64")),
    ("step in 2D, bfloat16 / float32", "step", ("equireg bfloat16", "196x141"), ("equireg", "196x141")),
    ("step in 3D, bfloat16 / float32", "step", ("equireg bfloat16", "64x64x64"), ("equireg", "64x64x64")),
    ("import equireg / import monai", "start", ("import equireg", ""), ("import monai", "")),
)


def table(rows: list[dict[str, str]]) -> None:
    """Print the medians, and the ratios that there are targets for."""
    found = medians(rows)
    print("| what | network | shape | seconds, median (least to most) | memory, MB |\n|---|---|---|---|---|")
    for (kind, network, shape), group in groups(rows).items():
        seconds, memory = found[kind, network, shape]
        times = [float(row["seconds"]) for row in group]
        print(f"| {kind} | {network} | {shape} | {seconds:.3g} ({min(times):.3g} to {max(times):.3g}) | {memory:.0f} |")
    floors(rows)
    for name, kind, mine, other in RATIOS:
        if (kind, *mine) in found and (kind, *other) in found:
            pairs = zip(found[(kind, *mine)], found[(kind, *other)])
            seconds, memory = (a / b if b else float("nan") for a, b in pairs)
            print(f"{name}: seconds x {seconds:.3f}, memory x {memory:.3f}")


def shares_of(row: dict[str, str]) -> dict[str, float]:
    """Return the numbers that a row has beside seconds and memory."""
    return {name: float(value) for name, _, value in (part.rpartition(" ") for part in row["shares"].split("; "))}


def floors(rows: list[dict[str, str]]) -> None:
    """Print operations on fields over the floors they contain: medians over the runs, and the range over all turns."""
    print("| operation | shape | ms | floor, ms | times the floor, median (least to most) |\n|---|---|---|---|---|")
    for (kind, name, shape), group in groups(rows).items():
        if kind == "operation":
            parts = [shares_of(row) for row in group]
            ratio, floor = (median(part[key] for part in parts) for key in ("ratio", "floor, ms"))
            span = f"{min(part['least'] for part in parts):.2f} to {max(part['most'] for part in parts):.2f}"
            ms = 1e3 * median(float(row["seconds"]) for row in group)
            print(f"| {name} | {shape} | {ms:.3g} | {floor:.3g} | {ratio:.2f} ({span}) |")


def draw(rows: list[dict[str, str]], output_dir: str) -> None:
    """Draw time and memory of registering a pair against the number of voxels."""
    from matplotlib.figure import Figure

    from equireg.pictures import save_figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    found = medians(rows)
    for number, network in enumerate(dict.fromkeys(key[1] for key in found if key[0] == "forward")):
        points = sorted(
            (int(shape.split("x")[0]) ** 3 / 1e6, *values)
            for (kind, name, shape), values in found.items()
            if kind == "forward" and name == network
        )
        for panel, column in zip(panels, (1, 2)):
            panel.plot([p[0] for p in points], [p[column] for p in points], "o-", color=f"C{number}", label=network)
    for panel, label in zip(panels, ("seconds", "memory, MB")):
        panel.set(xscale="log", yscale="log", xlabel="million voxels", ylabel=label)
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    folder = Path(output_dir) if output_dir else HERE.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / "benchmark.png")


if __name__ == "__main__":
    fire.Fire({"every": every, "one": one}, serialize=lambda _: None)
