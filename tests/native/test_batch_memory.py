from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from megalm._indexed_dataset import BatchMemory


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_given_out_again_when_the_array_and_all_its_views_are_gone() -> None:
    memory = BatchMemory()
    one = memory.empty((3, 4))
    assert (one.shape, one.dtype, one.flags.writeable) == ((3, 4), np.int64, True)
    place, view = address(one), one[1:].reshape(-1)
    del one
    assert address(memory.empty((12,))) != place
    view[:] = 7
    other = memory.empty((3, 4))
    other[:] = 0
    assert view.tolist() == [7] * 8
    del view
    assert address(memory.empty((12,))) == place


def test_arrays_outlive_what_they_are_from() -> None:
    memory = BatchMemory()
    array = memory.empty((100_000,))
    del memory
    array[:] = 3
    assert array.sum() == 300_000


def test_an_array_of_nothing_and_shapes_that_cannot_be() -> None:
    memory = BatchMemory()
    assert memory.empty((0, 5)).shape == (0, 5)
    for shape in [(-1,), (2**40, 2**40)]:
        with pytest.raises(ValueError, match="no possible shape"):
            memory.empty(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may map is limited on Linux only")
def test_sizes_that_are_not_asked_for_again_are_let_go() -> None:
    """Were they kept, 512 MB would be held: a limit of 64 MB on what may be mapped stands for a small machine."""
    script = """
import resource
from pathlib import Path
import numpy
from megalm._indexed_dataset import BatchMemory
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20),) * 2)
memory = BatchMemory()
for number in range(64):
    memory.empty((2 ** 20 + number,))
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_threads_never_share_a_block() -> None:
    memory = BatchMemory()
    torn = []

    def fill(token: int) -> None:
        for _ in range(300):
            array = memory.empty((1000,))
            array[:] = token
            torn.append(not (array == token).all())

    threads = [threading.Thread(target=fill, args=(token,)) for token in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(torn)
