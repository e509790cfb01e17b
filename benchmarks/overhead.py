"""What compiling costs where there is nothing to share: a world of one against the local model, eager.

    python -m benchmarks.overhead [--backend NAME] [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

One process on one core with one thread; 16 x 128 ids for the model of benchmarks/blocks.py (4 blocks of width 256,
vocabulary 4096). A step is forward, backward, AdamW and forgetting the gradients; both ways run in turns, each in a
process of its own. Before
anything is timed, loss and all gradients are compared. Ratios are seconds of own over eager's, of one round; with
`--backend` of torch.compile, such as inductor, both ways are compiled by it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import loss_of, made
from benchmarks.ways import (
    Limits,
    Way,
    adamw,
    against,
    compare_ways,
    expected,
    own_core,
    parser_of,
)

EAGER = "eager"


def own(backend: str) -> Way:
    """The compiled model."""
    model, batch = made()
    parallel = whalepy.compile(model, "1xcpu", batch, loss_fn=loss_of, backend=backend)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel}, adamw(parallel.parameters()))


def local(backend: str) -> Way:
    """The local model."""
    model, (ids, targets) = made()

    def loss_of_rows(x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model(x), y)

    run = loss_of_rows if backend == EAGER else torch.compile(loss_of_rows, backend=backend)

    def step() -> Tensor:
        loss = run(ids, targets)
        loss.backward()
        return loss.detach()

    return Way(step, {"": model}, adamw(model.parameters()))


def on_rank(backend: str, limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    makes: dict[str, Make] = {"own": partial(own, backend), backend: partial(local, backend)}
    return against(timed_ways(makes, expected, limits), "own")


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--backend", default=EAGER, help="of torch.compile, for both; default: eager")
    options = parser.parse_args()
    compare_ways("overhead", options, 1, partial(on_rank, options.backend))
