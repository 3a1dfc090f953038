"""Show in about two minutes what the project does: train a little, register a pair that hardly overlaps, draw it.

    python bundle/docs/demo.py --output_dir demo_output

Needs the package with its extras (`make venv`, or `pip install -e '.[all]'`), no download and no GPU. Training and
registration run the bundle's own commands; what they print goes to log files in the output folder.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from equireg.fields import warp
from equireg.io import read_displacement_field
from equireg.metrics import folding_fraction
from equireg.pictures import registration_figure, save_figure
from equireg.synthesis import smooth_field, vessel_tree

BUNDLE = Path(__file__).resolve().parents[1]
SIZE = 96  # of the square in which the vessels are drawn, voxels: about what the weights were trained on
# Shapes of the two images, and where that square lies in each: the vessels end up side by side.
MOVING_SHAPE, MOVING_CORNER = (176, 208), (8, 72)
FIXED_SHAPE, FIXED_CORNER = (256, 160), (120, 8)
FOREGROUND = 0.2  # brightness above which a voxel counts as vessel


def run(words: list[str], log: Path, shown: str, folder: Path | None = None) -> None:
    """Run a command, its output going to a log file.

    Args:
        words: of the command, its program first.
        log: file for the output; on a terminal, the progress bar is shown there instead.
        shown: how the command is shown, as a user would type it.
        folder: where it runs.

    Raises:
        SystemExit: if the command fails, after showing the end of its output.
    """
    live = sys.stderr.isatty()
    print(f"  $ {shown}", flush=True)
    # A warning would tear the progress bar apart; without a terminal it belongs into the log.
    environment = {**os.environ, **({"PYTHONWARNINGS": "ignore"} if live else {})}
    started = time.perf_counter()
    with log.open("w") as file:
        stderr = None if live else subprocess.STDOUT
        code = subprocess.run(words, cwd=folder, env=environment, stdout=file, stderr=stderr).returncode
    if code != 0:
        print(*log.read_text(errors="replace").splitlines()[-40:], sep="\n")
        raise SystemExit(f"The command failed with exit code {code}; its output is in {log}.")
    print(f"  done in {time.perf_counter() - started:.0f} s, log: {log}", flush=True)


def train(options: dict[str, Any], log: Path) -> None:
    """Run the bundle's training command, as its users do, from inside its folder."""
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    words = ["-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json", *flags]
    words += ["--progress", str(sys.stderr.isatty())]
    run([sys.executable, *words], log, f"cd {BUNDLE} && {shlex.join(['python', *words])}", BUNDLE)


def register(options: dict[str, Any], log: Path) -> None:
    """Run the command `equireg register`."""
    words = ["register", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    run([sys.executable, "-m", "equireg", *words], log, shlex.join(["equireg", *words]))


def make_pair(folder: Path, seed: int) -> torch.Tensor:
    """Write a pair of 2D images: a tree of vessels, and the same tree warped and far away.

    Args:
        folder: where `moving.nii.gz` and `fixed.nii.gz` go.
        seed: another seed draws another tree and warp.

    Returns:
        The true ddf `(2, *FIXED_SHAPE)`, voxels, from fixed to moving points.
    """
    generator = np.random.default_rng(seed)
    # Drawn at twice the size and averaged down: the vessels get soft edges, as in an image.
    tree = F.avg_pool2d(vessel_tree((2 * SIZE, 2 * SIZE), generator).float().unsqueeze(0), 2)
    # The bends have the size of those in the CARL paper's retina experiment, relative to the size of the tree.
    ddf = smooth_field((SIZE, SIZE), 3, 4.2, generator) + smooth_field((SIZE, SIZE), 6, 2.0, generator)
    squares = {"moving": tree, "fixed": warp(tree, ddf, padding="zeros")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, corner, shape in (("moving", MOVING_CORNER, MOVING_SHAPE), ("fixed", FIXED_CORNER, FIXED_SHAPE)):
        image = F.pad(squares[name], _around(corner, shape))[0, 0]
        nib.save(nib.Nifti1Image(image.numpy(), np.eye(4)), folder / f"{name}.nii.gz")
    shift = torch.tensor(MOVING_CORNER) - torch.tensor(FIXED_CORNER)
    return F.pad(ddf, _around(FIXED_CORNER, FIXED_SHAPE), mode="replicate")[0] + shift.reshape(2, 1, 1)


def _around(corner: tuple[int, int], shape: tuple[int, int]) -> list[int]:
    """Return the padding, in torch's order, that puts the square of vessels at a corner of a canvas."""
    (x, y), (width, height) = corner, shape
    return [y, height - SIZE - y, x, width - SIZE - x]


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the overlap of the vessels in two images of one shape, 0 to 1."""
    one, other = a > FOREGROUND, b > FOREGROUND
    return (2 * (one & other).sum() / (one.sum() + other.sum()).clamp(min=1)).item()


def report(inputs: Path, registration: Path, picture: Path, true_ddf: torch.Tensor) -> None:
    """Draw the picture of a finished registration and print how good it is.

    Args:
        inputs: folder that `make_pair` filled.
        registration: folder that the registration filled.
        picture: file to write.
        true_ddf: `(2, *FIXED_SHAPE)`, voxels.
    """
    paths = [inputs / "moving.nii.gz", inputs / "fixed.nii.gz", registration / "moved.nii.gz"]
    moving, fixed, moved = (torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32))[None] for path in paths)
    ddf, _ = read_displacement_field(registration / "fixed_to_moving.nii.gz")
    save_figure(registration_figure(moving, fixed, moved, ddf), picture)

    # Before registration: the moving image cropped and padded to the fixed one's shape, voxel indices unchanged.
    unregistered = F.pad(moving, [0, fixed.shape[2] - moving.shape[2], 0, fixed.shape[1] - moving.shape[1]])
    vessels = fixed[0] > FOREGROUND
    found, true = (field.norm(dim=0)[vessels].mean() for field in (ddf, true_ddf))
    error = (ddf - true_ddf).norm(dim=0)[vessels].mean()
    print(f"  Dice of the vessels    {dice(unregistered, fixed):.3f} before, {dice(moved, fixed):.3f} after")
    print(f"  mean displacement      {found:.1f} voxels found, {true:.1f} true; mean error {error:.2f} voxels")
    print(f"  folded cells           {100 * folding_fraction(ddf[None]).item():.2f} %")
    print("\nFiles:")
    files = {"before and after": picture, "moving": paths[0], "fixed": paths[1]}
    made = {
        "moved": "moved.nii.gz",
        "transform": "fixed_to_moving.nii.gz",
        "quality": "qc.png",
        "report": "report.json",
    }
    for name, path in {**files, **{name: registration / file for name, file in made.items()}}.items():
        print(f"  {name:<18}{path}")


def main(
    output_dir: str = "demo_output",
    epochs: int = 2,
    iterations: int = 10,
    seed: int = 0,
    optimize: int = 0,
    weights: str = "vessels",
) -> None:
    """Train a little, register two images of vessels that hardly overlap, and draw the result.

    Args:
        output_dir: folder for everything that is written.
        epochs: epochs of the short training run.
        iterations: steps of an epoch.
        seed: of the pair to register.
        optimize: steps of instance optimization after the network's answer.
        weights: name or file of trained weights for the registration.
    """
    started = time.perf_counter()
    output = Path(output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    inputs, training, registration = output / "input", output / "training", output / "registration"

    print(f"1. Training on synthetic anatomy: {epochs} epochs of {iterations} steps, a taste of the real thing")
    options = {"epochs": epochs, "iterations": iterations, "val_pairs": 2, "output_dir": training}
    train(options, output / "training.log")

    print("2. Drawing two images of vessels that hardly overlap, where affine methods find nothing to start from")
    true_ddf = make_pair(inputs, seed)
    print(f"  {inputs / 'moving.nii.gz'}\n  {inputs / 'fixed.nii.gz'}")

    print("3. Registering them with the trained weights of the bundle")
    options = {"moving": inputs / "moving.nii.gz", "fixed": inputs / "fixed.nii.gz", "output": registration}
    better = {"optimize": optimize} if optimize else {}
    register({**options, "weights": weights, **better}, output / "registration.log")

    print("4. Looking at the result")
    report(inputs, registration, output / "before_after.png", true_ddf)
    print(f"  {'trained network':<18}{training / 'model.pt'}")
    print(f"\nAll in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    fire.Fire(main)
