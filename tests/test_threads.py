"""Work in threads: order, look-ahead, errors; and files compressed by them."""

from __future__ import annotations

import gzip
import random
import time
from collections.abc import Iterator

import pytest
import torch

from equireg.threads import gzipped, in_threads
from equireg.world import as_field, invert_field


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_items_are_taken_late(threads: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    def work(number: int) -> tuple[int, int]:
        time.sleep(0.001 * (number % 3))
        return number, torch.get_num_threads()

    for expected, (number, alone) in enumerate(in_threads(work, items())):
        assert number == expected and alone == 1 and len(taken) <= number + 2 * threads + 2
    assert len(taken) == 40 and torch.get_num_threads() == threads


def test_work_sees_the_modes_of_the_caller(threads: int) -> None:
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert set(in_threads(modes, range(4))) == {(True, False)}
    with torch.no_grad():
        assert set(in_threads(modes, range(4))) == {(False, False)}
    with torch.inference_mode():
        assert set(in_threads(modes, range(4))) == {(False, True)}
        field = as_field(torch.ones(3, 60, 60, 60), torch.eye(4))  # more than a block
        assert (invert_field(field, torch.eye(4), (60, 60, 60)) == -1).all()


def test_an_error_of_the_work_is_raised(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 / number, [2, 1, 0, 1, 2]))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("sizes", [[], [0], [1], [200_000, 0, 3, 70_000]])
def test_gzip_reads_what_was_compressed(threads: int, sizes: list[int]) -> None:
    source = random.Random(0)
    parts = [bytes(source.choices(b"abcd", k=size)) for size in sizes]
    packed = b"".join(gzipped([lambda part=part: part for part in parts]))
    assert gzip.decompress(packed) == b"".join(parts)
    assert len(packed) < 0.5 * sum(sizes) + 200
    broken = bytearray(packed)
    broken[-6] ^= 1  # the checksum
    with pytest.raises(gzip.BadGzipFile):
        gzip.decompress(bytes(broken))
