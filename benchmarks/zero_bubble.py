"""A pipeline of two stages with weight gradients apart (zero-bubble) against 1F1B, on gloo ranks of this machine.

    python -m benchmarks.zero_bubble [--microbatches N] [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Two ranks, each on one core with one thread; a step is forward, backward and gradients that are ready, of the model of
benchmarks/blocks.py, cut ahead of its last block. Both ways in turns, in processes of their own. Before anything is
timed, loss and all gradients of each are compared with the local model. What is won is the bubble of 1F1B, 1 / (N + 1)
of a step; what it costs is that the gradients of a weight are noted down, kept and computed one operator at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import loss_of, made
from benchmarks.ways import Limits, Way, against, compare_ways, expected, own_core, parser_of

RANKS = 2


def own(schedule: str, microbatches: int) -> Way:
    """The same two stages under a schedule."""
    model, batch = made()
    first, second = whalepy.stage(1), whalepy.stage(1)
    whalepy.annotate(model, {"embedding": first, "blocks.[012]": first, "blocks.3": second, "head": second})
    options: dict[str, Any] = {"microbatches": microbatches, "schedule": schedule}
    parallel = whalepy.compile(model, f"{RANKS}xcpu", batch, loss_fn=loss_of, **options)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel})


def on_rank(microbatches: int, limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    makes: dict[str, Make] = {schedule: partial(own, schedule, microbatches) for schedule in ("zero-bubble", "1f1b")}
    return against(timed_ways(makes, expected, limits), "zero-bubble")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args()
    compare_ways("zero_bubble", options, RANKS, partial(on_rank, options.microbatches))


if __name__ == "__main__":
    main()
