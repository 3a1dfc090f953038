"""Deformable image registration with networks that are equivariant by construction.

`equireg.networks.CARL` and the blocks it is made of, losses, metrics, transforms and data for MONAI projects. Inside
the bundle the same package is called `scripts`. Public names are imported on first use, so that importing the package
is instant and loads neither torch nor MONAI.

Example:
    >>> import equireg
    >>> equireg.fields.identity_grid([3]).tolist()
    [[[0.0, 1.0, 2.0]]]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        atomic,
        augmentation,
        batch,
        curves,
        data,
        equivariance,
        evaluation,
        fields,
        handlers,
        images,
        inferer,
        io,
        landmarks,
        learn2reg,
        lists,
        losses,
        metrics,
        moves,
        networks,
        optimization,
        pairs,
        pictures,
        preparation,
        registration,
        results,
        spaces,
        synthesis,
        transform_files,
        transforms,
        weights,
        world,
    )
    from .registration import Registration, register
    from .weights import load_network

__all__ = [
    "Registration",
    "__version__",
    "atomic",
    "augmentation",
    "batch",
    "curves",
    "data",
    "equivariance",
    "evaluation",
    "fields",
    "handlers",
    "images",
    "inferer",
    "io",
    "landmarks",
    "learn2reg",
    "lists",
    "load_network",
    "losses",
    "metrics",
    "moves",
    "networks",
    "optimization",
    "pairs",
    "pictures",
    "preparation",
    "register",
    "registration",
    "results",
    "spaces",
    "synthesis",
    "transform_files",
    "transforms",
    "weights",
    "world",
]

__version__ = "0.1.0"

# Public functions and classes, and the modules that define them; every other public name is a module.
_DEFINED_IN = {"load_network": "weights", "register": "registration", "Registration": "registration"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _DEFINED_IN:
        value = getattr(import_module(f".{_DEFINED_IN[name]}", __name__), name)
    else:
        value = import_module(f".{name}", __name__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names before they are imported, too."""
    return sorted({*globals(), *__all__})
