from __future__ import annotations

from functools import partial

import pytest

from megalm.parallel.weight_gradients import Product, WeightGradientQueue


def filled() -> tuple[WeightGradientQueue, list[str]]:
    """A queue with three products, and what they note when they are prepared and run."""
    queue, notes = WeightGradientQueue(), list[str]()
    with queue.defer("key"):
        for i in range(3):
            queue.put(Product(partial(notes.append, f"run {i}"), partial(notes.append, f"prepare {i}")))
    return queue, notes


@pytest.mark.parametrize("early", [0, 1, 2])
def test_each_product_is_prepared_once_before_the_one_ahead_of_it_runs(early: int) -> None:
    queue, notes = filled()
    for _ in range(early):
        queue.prepare("key")
    assert notes == ["prepare 0"][:early]
    queue.run("key")
    assert notes == ["prepare 0", "prepare 1", "run 0", "prepare 2", "run 1", "run 2"]


def test_what_ran_is_forgotten_and_other_keys_wait() -> None:
    queue, notes = filled()
    queue.run("other")
    queue.prepare("other")
    assert notes == []
    queue.run("key")
    del notes[:]
    queue.run("key")
    assert notes == []


def test_nothing_waits_that_is_not_deferred() -> None:
    queue = WeightGradientQueue()
    with pytest.raises(AssertionError, match="nothing is deferred"):
        queue.put(Product(lambda: None))
