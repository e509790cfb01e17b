"""Data parallelism on ranks of speed 2:1:1, nothing configured, against DistributedDataParallel and equal shares.

    python -m benchmarks.unequal_devices [--rows N] [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Three gloo ranks with one thread each: the first has a core of its own, the other two share one (sched_setaffinity). A
step is forward, backward and gradients that are ready, of the model of benchmarks/blocks.py. Three ways, in turns,
each in processes of its own:
- planned: whalepy with `cluster_spec=None`, so that the ranks measure their speeds and share the rows accordingly;
- equal: whalepy with equal shares;
- ddp: torch's DistributedDataParallel with equal rows.

Rows are 24 x 128 ids, which both three equal ranks and 2:1:1 divide: of the 16 rows of the other benchmarks equal ranks
would get 6:5:5, and the slow ones no more than a fifth too many. `bound` is the time of the slow ranks with equal rows
over that at 2:1:1. What these cores give of it is timed in the same rounds: the local model forward and backward on the
rows of each rank, alone, without communication (`cores`). Before anything is timed, loss and all gradients of each way
are compared with the local model.
Ranks that share a core take a longer or shorter part of it in one step than in another: medians are over pairs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import loss_of, made
from benchmarks.data_parallel import ddp
from benchmarks.pairs import machine
from benchmarks.ways import (
    Limits,
    Way,
    expected,
    gain,
    limits_of,
    on_ranks,
    own_core,
    parser_of,
    report,
    within,
)
from whalepy.runtime.parallel import ParallelModel

RANKS, ROWS = 3, 24
SHARED = (1, 2)
"""The ranks on one core."""


def own(cluster: str | None, rows: int) -> Way:
    """whalepy under one replicate level; measured anew where no cluster is given."""
    model, batch = made(rows)
    whalepy.annotate(model, {"": whalepy.replicate()})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # nothing that was measured before
        parallel = whalepy.compile(model, cluster, batch, loss_fn=loss_of)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel})


def alone(rows: int) -> Callable[[], object]:
    """The local model forward and backward on so many rows."""
    model, (ids, targets) = made(rows)

    def step() -> None:
        model.zero_grad()
        loss_of(model(ids), targets).backward()

    return step


def shares_of(rows: int, way: Way) -> dict[str, Any]:
    """Rows and speed of each rank."""
    parallel = way.modules[""]
    if not isinstance(parallel, ParallelModel):
        return {}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, len(parallel.local_batch(made(rows)[1])[0]))
    return {"rows": everyone, "speeds": list(parallel.plan.stages[0].speeds)}


def on_rank(rows: int, limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core(1 if dist.get_rank() in SHARED else 0)
    makes: dict[str, Make] = {
        "planned": partial(own, None, rows),
        "equal": partial(own, f"{RANKS}xcpu", rows),
        "ddp": partial(ddp, rows),
    }

    def beside(known: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
        return {"planned alone": alone(known["planned"]["rows"][dist.get_rank()]), "equal alone": alone(rows // RANKS)}

    found = timed_ways(makes, partial(expected, rows), limits, partial(shares_of, rows), beside)
    return {
        **found.known["planned"],
        "bound": (rows / RANKS) / (rows / 4),
        "equal": gain(found.seconds["equal"], found.seconds["planned"]),
        "cores": gain(found.seconds["equal alone"], found.seconds["planned alone"]),
        "ddp": gain(found.seconds["ddp"], found.seconds["planned"]),
        **found.rounds,
        "steps_ms": found.steps_ms(),
    }


def shown(row: dict[str, Any], of: str) -> str:
    one = row[of]
    return f"planned {one['planned_ms']:8.1f} ms, {of:6} {one['other_ms']:8.1f} ms, {one['gain']:.3f} x {within(one)}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the global batch; a multiple of 3")
    options = parser.parse_args()
    if options.rows % RANKS:
        parser.error(f"--rows must be a multiple of {RANKS}")
    before = machine()
    row = on_ranks(RANKS, on_rank, options.rows, limits_of(options))
    print(f"rows {':'.join(map(str, row['rows']))} at measured speeds {row['speeds']}; bound {row['bound']:.3f} x")
    print(shown(row, "cores"), shown(row, "equal"), shown(row, "ddp"), sep="\n")
    remark = f"{row['repeated_rounds']} rounds repeated; "
    report(options.results, "unequal_devices", before, {"replicate": row}, remark)


if __name__ == "__main__":
    main()
