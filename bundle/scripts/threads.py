"""Work shared out to threads in large pieces, and what is written compressed by them."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["gzipped", "in_threads"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Do work on as many threads as torch has, each of which runs torch alone.

    Threads that share every operation, as torch does by itself, wait for each other all the time, and on a busy machine
    much longer than they work.

    Args:
        work: takes an item; it sees the caller's gradient and inference mode.
        items: taken no faster than results are asked for.

    Yields:
        The results, in order.

    Example:
        >>> list(in_threads(lambda number: number**2, [1, 2, 3]))
        [1, 4, 9]
    """
    threads, inference, grad = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    if threads == 1:
        yield from map(work, items)
        return

    def alike(item: _Item) -> _Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(item)

    pending: deque[Future[_Result]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                pending.append(pool.submit(alike, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # what a worker sets would hold for threads to come


def gzipped(parts: Iterable[Callable[[], bytes]]) -> Iterator[bytes]:
    """Compress the parts of a file, at the level that is fastest.

    The result is one member of one stream: parts end on a byte, as those of `pigz` do.

    Reference: Deutsch, "GZIP file format specification version 4.3", https://www.rfc-editor.org/rfc/rfc1952.

    Args:
        parts: each returns the bytes of one part.

    Yields:
        The bytes of the file.

    Example:
        >>> import gzip
        >>> gzip.decompress(b"".join(gzipped([lambda: b"one, ", lambda: b"two"])))
        b'one, two'
    """
    yield b"\x1f\x8b\x08" + bytes(5) + b"\x04\xff"
    checksum, size = 0, 0
    for part, deflated in in_threads(_deflated, parts):
        checksum, size = zlib.crc32(part, checksum), size + len(part)
        yield deflated
    yield zlib.compressobj(1, zlib.DEFLATED, -15).flush()
    yield struct.pack("<LL", checksum, size & 0xFFFFFFFF)


def _deflated(make: Callable[[], bytes]) -> tuple[bytes, bytes]:
    part, encoder = make(), zlib.compressobj(1, zlib.DEFLATED, -15)
    return part, encoder.compress(part) + encoder.flush(zlib.Z_FULL_FLUSH)
