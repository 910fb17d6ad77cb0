"""Weight gradients that wait: a linear layer's backward gives its input's gradient at once and leaves the product for
the weight's gradient here, to be run when the pipeline has nothing better to do (zero bubble, arXiv 2401.10241).

    executor                       layer's backward                executor
    defer(key)  -> backward() ->   put(product)  put(product) ->   run(key)

The queue is an object that the layers are given, and no context variable: on a GPU autograd runs on threads of its own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A weight gradient that is left to be computed."""

    run: Callable[[], None]
    """Computes it and adds it to the parameter's `.grad`."""
    prepare: Callable[[], None] | None = None
    """Starts what `run` will wait for, such as gathering the layer's input again; must not block."""


@dataclass
class WeightGradientQueue:
    """The products of each (stage, micro-batch), in the order of the backward pass."""

    key: Hashable | None = None
    """Where `put` puts; None where weight gradients are computed at once."""
    splits: bool = True
    """Whether the backward pass of what now goes forward may leave anything here. Layers for which that makes no
    difference otherwise are then autograd's own, which are faster."""
    pool: list[Tensor] | None = None
    """During a step, the head's weight gradient, which is computed in the forward pass: the sum over the micro-batches
    in flight, in place of one of its size for each."""
    _waiting: dict[Hashable, list[Product]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def defer(self, key: Hashable) -> Iterator[None]:
        """A backward pass inside of this block leaves its weight gradients under `key`."""
        self.key = key
        try:
            yield
        finally:
            self.key = None

    def put(self, product: Product) -> None:
        """Called by a layer's backward while `key` is set."""
        assert self.key is not None, "nothing is deferred"
        self._waiting[self.key].append(product)

    def prepare(self, key: Hashable) -> None:
        """Starts what the first product under `key` waits for, once."""
        if (waiting := self._waiting.get(key)) and (prepare := waiting[0].prepare) is not None:
            waiting[0] = Product(waiting[0].run)
            prepare()

    def run(self, key: Hashable) -> None:
        """Computes and forgets all under `key`, each product's successor prepared before it runs."""
        self.prepare(key)
        products = deque(self._waiting.pop(key, ()))
        while products:
            product = products.popleft()
            if products and (prepare := products[0].prepare) is not None:
                prepare()
            product.run()


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Adds to `.grad`, as autograd does."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
