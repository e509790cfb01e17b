"""A stage on one rank that feeds a stage on two, as simulated and as measured, on gloo ranks of this machine.

    python -m benchmarks.pipeline_unequal [--steps N] [--results FILE]

The model of benchmarks/blocks.py, 8 microbatches, 1F1B; the second stage is split 3 : 1, or its two ranks take rows
1 : 1. Three processes share two cores, which is part of what every action takes. In each step every rank notes what
its actions take, less what they wait for messages; planner/schedule/simulate.py plays the schedule with what was noted
(of two ranks that do an action together, `SHARED` says which), and messages with half of a round trip of their bytes,
taken in the same run. A ratio is measured over simulated, of one step; the median, and its 95 % interval, are over the
steps. Measured is the whole train_step, with the agreement before the schedule and the loss told after it; `before`
gives one simulation from the medians of half of the steps, against the median of the other half.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import whalepy
from benchmarks.blocks import BLOCKS, LENGTH, ROWS, WIDTH, loss_of, made
from benchmarks.pairs import interval, machine
from benchmarks.pipeline import MICROBATCHES, units
from benchmarks.ways import on_ranks, parser_of, report
from whalepy.planner.schedule.actions import MESSAGES, Action
from whalepy.planner.schedule.simulate import simulate
from whalepy.runtime.boundary import Receiving
from whalepy.runtime.captured import CapturedModel
from whalepy.runtime.parallel import ParallelModel

WIDE: dict[str, Callable[[], list[Any]]] = {
    "split 3:1": lambda: [whalepy.stage(2), whalepy.split(2, shares=(3, 1))],
    "rows 1:1": lambda: [whalepy.stage(2), whalepy.replicate(2, shares=(1, 1))],
}
# Ranks of a split meet in every action, so both take what the slower does; those of rows meet in REDUCE alone.
SHARED: dict[str, Callable[[Sequence[float]], float]] = {"split 3:1": max, "rows 1:1": statistics.mean}
Seconds = Mapping[Action, float]


@dataclass
class Noted:
    """What the actions of one step took on this rank, in their order."""

    seconds: dict[Action, float] = field(default_factory=dict[Action, float])
    waited_s: float = 0.0

    @contextlib.contextmanager
    def playing(self, action: Action) -> Generator[None]:
        self.waited_s = 0.0
        start = time.perf_counter()
        yield
        self.seconds[action] = time.perf_counter() - start - self.waited_s

    def wait(self, receiving: Receiving) -> None:
        start = time.perf_counter()
        for work in receiving.works:
            work.wait()
        self.waited_s += time.perf_counter() - start


def compiled(kind: str) -> tuple[ParallelModel, Sequence[Any]]:
    """The pipeline of three ranks and this rank's rows."""
    model, batch = made()
    names = list(units(model))
    cut = BLOCKS // 2 + 1
    wide = WIDE[kind]()
    whalepy.annotate(model, {**dict.fromkeys(names[:cut], whalepy.stage(1)), **dict.fromkeys(names[cut:], wide)})
    parallel = whalepy.compile(model, "3xcpu", batch, loss_fn=loss_of, microbatches=MICROBATCHES, schedule="1f1b")
    return parallel, parallel.local_batch(batch)


def noted_step(parallel: ParallelModel, rows: Sequence[Any]) -> tuple[float, list[dict[Action, float]]]:
    """Seconds of a step on the rank that takes longest, and what all ranks noted."""
    parallel.zero_grad()
    noted = Noted()
    with (
        mock.patch.object(CapturedModel, "_playing", lambda _, action: noted.playing(action)),
        mock.patch.object(Receiving, "wait", lambda receiving: noted.wait(receiving)),
    ):
        dist.barrier()
        start = time.perf_counter()
        parallel.train_step(*rows)
        took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, noted.seconds)
    return float(took), everyone


def round_trip_s(trips: int = 30) -> float:
    """The median round trip between ranks 0 and 1 of what crosses for a microbatch."""
    message = torch.zeros(ROWS // MICROBATCHES, LENGTH, WIDTH)
    times: list[float] = []
    for _ in range(trips):
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() < 2:
            for turn in range(2):
                (dist.send if dist.get_rank() == turn else dist.recv)(message, 1 - dist.get_rank())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def simulated_s(parallel: ParallelModel, everyone: Sequence[Seconds], kind: str, message_s: float) -> float:
    """The step that the simulation gives for what ranks noted."""
    plan = parallel.plan
    ranks = [plan.stages[stages[0]].rank_of for stages in plan.hosts]
    actions = [tuple(everyone[own[0]]) for own in ranks]
    of = {action: own for own, each in zip(ranks, actions, strict=True) for action in each}

    def duration(action: Action) -> float:
        if action.op in MESSAGES:
            return message_s
        taken = [everyone[rank][action] for rank in of[action]]
        # In REDUCE the rank that comes first waits for the others.
        return min(taken) if action.op == "REDUCE" else SHARED[kind](taken)

    return simulate(actions, duration).step_s


def medians(steps: Sequence[Sequence[Seconds]]) -> list[dict[Action, float]]:
    """Per rank and action, over steps."""
    return [
        {action: statistics.median(step[rank][action] for step in steps) for action in steps[0][rank]}
        for rank in range(len(steps[0]))
    ]


def on_rank(kind: str, steps: int) -> dict[str, Any]:
    """All figures of one kind of second stage."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parallel, rows = compiled(kind)
    for _ in range(3):
        noted_step(parallel, rows)
    message_s = round_trip_s() / 2
    found = [noted_step(parallel, rows) for _ in range(steps)]
    measured = [took for took, _ in found]
    simulated = [simulated_s(parallel, everyone, kind, message_s) for _, everyone in found]
    ratios = [a / b for a, b in zip(measured, simulated, strict=True)]
    before = simulated_s(parallel, medians([everyone for _, everyone in found[::2]]), kind, message_s)
    after = statistics.median(measured[1::2])
    return {
        "kind": kind,
        "measured_ms": round(1e3 * statistics.median(measured), 2),
        "simulated_ms": round(1e3 * statistics.median(simulated), 2),
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(edge, 4) for edge in interval(ratios)],
        "steps": steps,
        "message_ms": round(1e3 * message_s, 3),
        "before": {"measured_ms": round(1e3 * after, 2), "simulated_ms": round(1e3 * before, 2)},
        "steps_ms": [[round(1e3 * a, 2), round(1e3 * b, 2)] for a, b in zip(measured, simulated, strict=True)],
    }


def shown(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    before = row["before"]
    return (
        f"{row['kind']:10} measured {row['measured_ms']:8.1f} ms, simulated {row['simulated_ms']:8.1f} ms, "
        f"ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}] in {row['steps']} steps; "
        f"of medians {before['measured_ms'] / before['simulated_ms']:.3f}"
    )


def main() -> None:
    parser = parser_of(__doc__, pairs=False)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--kind", action="append", choices=list(WIDE), help="default: both")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before = machine()
    for kind in options.kind or WIDE:
        rows.append(on_ranks(3, on_rank, kind, options.steps))
        print(shown(rows[-1]), flush=True)
    report(options.results, "pipeline_unequal", before, {"rows": rows})


if __name__ == "__main__":
    main()
