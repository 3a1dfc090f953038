"""What all tests share: seeds, the number of threads and the folder with real images."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="CPU threads for torch (default 1; 0 is torch's choice)")


def pytest_configure(config: pytest.Config) -> None:
    # The tensors of tests are small: more threads cost more than they bring, and one makes sums reproducible.
    if config.getoption("--threads") > 0:
        torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the folder that holds `bundle/`, `tests/` and `setup.cfg`."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with real images, or skip the test where it is missing."""
    folder = Path(os.environ.get("EQUIREG_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real images in {folder}, which does not exist")
    return folder
