"""Data parallelism on ranks of speed 2:1:1, nothing configured, against DistributedDataParallel and equal shares.

    python -m benchmarks.unequal_devices [--rows N] [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Three gloo ranks with one thread each: the first has a core of its own, the other two share one (sched_setaffinity). A
step is forward, backward and gradients that are ready, of the model of benchmarks/blocks.py. Three ways, in turns, in
the same processes:
- planned: whalepy with `cluster_spec=None`, so that the ranks measure their speeds and share the rows accordingly;
- equal: whalepy with equal shares;
- ddp: torch's DistributedDataParallel with equal rows.

Rows are 24 x 128 ids, which both three equal ranks and 2:1:1 divide: of the 16 rows of the other benchmarks equal ranks
would get 6:5:5, and the slow ones no more than a fifth too many. `bound` is the time of the slow ranks with equal rows
over that at 2:1:1. Before anything is timed, loss and all gradients of each way are compared with the local model.
Ranks that share a core take a longer or shorter part of it in one step than in another: medians are over pairs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import whalepy
from benchmarks.blocks import loss_of, made
from benchmarks.pairs import OTHERS, figures, in_turns, machine
from benchmarks.pipeline import Way, differences, expected, on_ranks
from whalepy.runtime.parallel import ParallelModel

RANKS, ROWS = 3, 24
SHARED = (1, 2)
"""The ranks on one core."""


def bound_to_cores() -> None:
    """Rank 0 on a core of its own, the others on one together; one thread each."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[1 if dist.get_rank() in SHARED else 0]})
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_rank()), str(dist.get_world_size())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def own(cluster: str | None, rows: int) -> tuple[Way, ParallelModel]:
    """whalepy under one replicate level; measured anew where no cluster is given."""
    model, batch = made(rows)
    whalepy.annotate(model, {"": whalepy.replicate()})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # nothing that was measured before
        parallel = whalepy.compile(model, cluster, batch, loss_fn=loss_of)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel}), parallel


def ddp(rows: int) -> Way:
    """torch's data parallelism; gradients and loss are means over ranks, which have equally many rows."""
    model, (ids, targets) = made(rows)
    parallel = DistributedDataParallel(model)
    each = slice(dist.get_rank() * rows // RANKS, (dist.get_rank() + 1) * rows // RANKS)

    def step() -> None:
        loss_of(parallel(ids[each]), targets[each]).backward()

    return Way(step, {"": model})


def shares_of(parallel: ParallelModel, rows: int) -> list[int]:
    """Rows of each rank."""
    mine = len(parallel.local_batch(made(rows)[1])[0])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def on_rank(rows: int, pairs: int, others: float, limit_s: float) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    bound_to_cores()
    planned, parallel = own(None, rows)
    ways = {"planned": planned, "equal": own(f"{RANKS}xcpu", rows)[0], "ddp": ddp(rows)}
    wrong = {name: differences(way, *expected(rows)) for name, way in ways.items()}
    if any(wrong.values()):
        raise ValueError(f"not the same loss and gradients: {wrong}")

    def forget() -> None:
        for way in ways.values():
            way.forget()

    found, repeated = in_turns([way.step for way in ways.values()], forget, pairs, others=others, limit_s=limit_s)
    if not found[0]:
        raise ValueError(f"other processes were busy in all {repeated} rounds")
    times = dict(zip(ways, found, strict=True))
    return {
        "rows": shares_of(parallel, rows),
        "speeds": list(parallel.plan.stages[0].speeds),
        "bound": (rows / RANKS) / (rows / 4),
        "equal": gain(times["equal"], times["planned"]),
        "ddp": gain(times["ddp"], times["planned"]),
        "repeated_rounds": repeated,
        "others_at_most": others,
        "steps_ms": {name: [round(1e3 * one, 2) for one in each] for name, each in times.items()},
    }


def gain(other: Sequence[float], planned: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as the other way, with the interval of the median."""
    found = figures(other, planned)
    return {
        "planned_ms": found["other_ms"],
        "other_ms": found["own_ms"],
        "gain": found["ratio"],
        "interval": found["interval"],
        "pairs": found["pairs"],
    }


def shown(row: dict[str, Any], of: str) -> str:
    one = row[of]
    low, high = one["interval"]
    return (
        f"planned {one['planned_ms']:8.1f} ms, {of:6} {one['other_ms']:8.1f} ms, "
        f"{one['gain']:.3f} x [{low:.3f}, {high:.3f}] in {one['pairs']} pairs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the global batch; a multiple of 3")
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--others", type=float, default=OTHERS, help="share of the cores that others may take")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which no pairs are added")
    parser.add_argument("--results", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.rows % RANKS:
        parser.error(f"--rows must be a multiple of {RANKS}")
    before = machine()
    row = on_ranks(RANKS, on_rank, options.rows, options.pairs, options.others, options.limit)
    print(f"rows {':'.join(map(str, row['rows']))} at measured speeds {row['speeds']}; bound {row['bound']:.3f} x")
    print(shown(row, "equal"), shown(row, "ddp"), sep="\n")
    print(f"{row['repeated_rounds']} rounds repeated; load before {before['load']}, after {machine()['load']}")
    if options.results:
        made_of = {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.unequal_devices"}
        options.results.write_text(json.dumps({**made_of, **before, "replicate": row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
