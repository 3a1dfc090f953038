"""One of several processes that train and evaluate together; `test_processes.py` starts it under torchrun.

Arguments: a JSON file with a list of jobs `{"name", "kind", "configs", "options"}`, and a folder. Runs one job after
another and writes what this process saw of each to `{name}_rank{rank}.json` in the folder: losses, fingerprints of
parameters and buffers after every step, and the metrics of the last evaluation.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.bundle import create_workflow


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return a fingerprint of the exact values of tensors."""
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def gloo_threads() -> int:
    """Return how many threads gloo has in this process, where the system lists them."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def seen(kind: str, configs: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Run a workflow and return what this process saw."""
    workflow = create_workflow(config_file=configs, workflow_type="train", logging_file=False, **options)
    network, evaluator = (workflow.parser.get_parsed_content(key) for key in ("network_def", "validate#evaluator"))
    steps: list[dict[str, Any]] = []

    def note(engine: Engine) -> None:
        loss, buffers = engine.state.output["loss"].item(), network.buffers()
        steps.append({"loss": loss, "parameters": digest(network.parameters()), "buffers": digest(buffers)})

    if kind == "training":
        workflow.trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    workflow.run()
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items()}
    items = evaluator.state.iteration
    return {"steps": steps, "metrics": metrics, "evaluated": items}


def main(jobs: str, folder: str) -> None:
    """Run all jobs."""
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for job in json.loads(Path(jobs).read_text()):
        # A folder for each process shows which of them write.
        output_dir = Path(folder) / f"{job['name']}_written_by_{rank}"
        result = seen(job["kind"], job["configs"], {**job["options"], "output_dir": str(output_dir)})
        (Path(folder) / f"{job['name']}_rank{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():  # only now: gloo may wait forever for a second group under one launch
        dist.destroy_process_group()
        threads = gloo_threads()
        gc.collect()  # what still holds the group keeps its threads, and those abort a process that ends before them
        (Path(folder) / f"threads_of_{rank}.json").write_text(json.dumps([threads, gloo_threads()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
