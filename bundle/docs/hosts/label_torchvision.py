"""Let MONAI Label start where torchvision does not import, as beside a CPU build of torch from another index.

    python bundle/docs/hosts/label_torchvision.py

MONAI Label imports two functions of torchvision when it starts, and calls them only to draw the progress of DeepEdit,
which this bundle does not use. Where the real package is missing or broken, a stand-in goes into the environment that
runs this script; it says so when it is called.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

STAND_IN = '''"""A stand-in for torchvision: names that MONAI Label imports and the equireg bundle does not use."""


def make_grid(*args, **kwargs):
    raise NotImplementedError("this environment has no torchvision, only a stand-in for it")


save_image = make_grid
'''


def main() -> None:
    """Write the stand-in unless there is something that imports."""
    try:
        import torchvision.utils  # noqa: F401
    except (ImportError, RuntimeError):  # the latter where its compiled part does not fit torch
        folder = Path(sysconfig.get_paths()["purelib"]) / "torchvision"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "utils.py").write_text(STAND_IN)
        print(f"torchvision does not import: a stand-in for it is now in {folder}")


if __name__ == "__main__":
    main()
