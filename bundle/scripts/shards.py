"""A list shared by processes that need not know of each other, and one table of what all of them found.

Process `k` of `n` takes every n-th entry, beginning with the k-th. When it ends it leaves its rows in a file of its own
and writes the table anew from all such files, so that the last one to end leaves the whole table. Nothing waits, and
nothing is lost when a process dies: run it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .images import writable_folder
from .results import write_text

__all__ = ["Shard"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Which part of a list is this process's.

    Args:
        index: number of the process, from 0.
        count: number of processes.

    Raises:
        ValueError: if there is no such process.

    Example:
        >>> Shard(1, 3).take("abcdefg")
        'be'
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"expected a process number from 0 to {self.count - 1}, got {self.index}.")

    @classmethod
    def from_environment(cls) -> Shard:
        """Return the part that `RANK` and `WORLD_SIZE` name, which `torchrun` sets; all where neither is set.

        Raises:
            ValueError: if only one of them is set, or they are no such numbers.
        """
        rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None and size is None:
            return cls()
        try:
            return cls(int(rank or ""), int(size or ""))
        except ValueError:
            raise ValueError(
                f"RANK and WORLD_SIZE in the environment are the number of this process, from 0, and that of all, "
                f"got {rank} and {size}."
            ) from None

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of a list, the same at every call."""
        return items[self.index :: self.count]

    def join(
        self,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        folder: str | Path,
        table: str,
        write: Callable[[list[dict[str, Any]]], object],
        key: str = "",
    ) -> list[dict[str, Any]]:
        """Leave the rows of this process, and write the table of all rows that there are.

        Args:
            rows: of this process, each with a `name`; plain numbers and texts.
            names: of the whole list, in the order of the table; rows of other names are left out.
            folder: where the table is, and the folder `.shares` with the rows of each process.
            table: name of the table.
            write: writes the table.
            key: says what the rows are of, such as the list and the options; rows left under another key are not read.

        Returns:
            The rows of the table.
        """
        if self.count == 1:
            found = _ordered([rows], names)
            write(found)
            return found
        shares = writable_folder(Path(folder) / ".shares")
        write_text(json.dumps({"key": key, "rows": list(rows)}), shares / f"{table}_{self.index}_of_{self.count}.json")
        before: list[str] = []
        while True:
            texts = [path.read_text() for path in sorted(shares.glob(f"{table}_*_of_{self.count}.json"))]
            if texts == before:
                return found
            # Others may end now: who writes last reads last, too, and so leaves all there is.
            left = [json.loads(text) for text in texts]
            before, found = texts, _ordered([share["rows"] for share in left if share["key"] == key], names)
            write(found)


def _ordered(shares: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> list[dict[str, Any]]:
    known = {row["name"]: dict(row) for rows in shares for row in rows}
    return [known[name] for name in names if name in known]
