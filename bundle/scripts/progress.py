"""A progress bar where it helps: on a terminal, if tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from monai.utils import optional_import

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, unit: str = "it") -> Iterable[Item]:
    """Show how far a loop has come and how long it has to go, on standard error if that is a terminal.

    Args:
        items: what to loop over.
        description: what is being done.
        unit: what one item is.

    Returns:
        The same items.

    Example:
        >>> list(progress(range(3), "counting"))
        [0, 1, 2]
    """
    tqdm, installed = optional_import("tqdm", name="tqdm")
    return tqdm(items, desc=description, unit=unit, disable=None) if installed else items
