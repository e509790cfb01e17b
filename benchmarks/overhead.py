"""What compiling costs where there is nothing to share: a world of one against the local model, eager.

    python -m benchmarks.overhead [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

One process on one core with one thread; 16 x 128 ids for the model of benchmarks/blocks.py (4 blocks of width 256,
vocabulary 4096). A step is forward, backward, AdamW and forgetting the gradients; both ways run in turns. Before
anything is timed, loss and all gradients are compared. Ratios are seconds of own over eager's, of one round.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import whalepy
from benchmarks.blocks import loss_of, made
from benchmarks.ways import (
    Limits,
    Way,
    adamw,
    against,
    compare_ways,
    expected,
    own_core,
    timed_ways,
)


def own() -> Way:
    """The compiled model."""
    model, batch = made()
    parallel = whalepy.compile(model, "1xcpu", batch, loss_fn=loss_of)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel}, adamw(parallel.parameters()))


def eager() -> Way:
    """The local model."""
    model, (ids, targets) = made()

    def step() -> Tensor:
        loss = loss_of(model(ids), targets)
        loss.backward()
        return loss.detach()

    return Way(step, {"": model}, adamw(model.parameters()))


def on_rank(limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    return against(timed_ways({"own": own(), "eager": eager()}, expected(), limits), "own")


if __name__ == "__main__":
    compare_ways("overhead", __doc__, 1, on_rank)
