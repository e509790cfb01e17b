"""Pipelines on ranks of unequal speed: cut by measured speeds against even cuts.

    python -m benchmarks.unequal_stages [--kind NAME] [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Gloo ranks with one thread each (sched_setaffinity):
- 2 stages: the second rank shares its core with a process that never stops: speed 2:1;
- 3 stages: the second and third rank share a core: speed 2:1:1.

8 blocks of the model of benchmarks/blocks.py, 16 x 128 ids, 8 microbatches, 1F1B; a step is forward, backward and
gradients that are ready. The ranks measure their speeds as `compile` does without a cluster; blocks, counted in
floating-point operations (the embedding with the first, the head with the last), are cut so that the slowest stage
ends earliest (`whalepy.planner.cut`), against equal numbers of blocks, in turns in the same processes.
`bound` is what a simulation of both schedules with these counts and 2:1 or 2:1:1 says. Before anything is timed, loss
and all gradients are compared with the local model.

A rank that waits leaves the core to the one it shares it with: with three stages each is then faster than half of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import ROWS, loss_of, made
from benchmarks.pairs import machine
from benchmarks.pipeline import MICROBATCHES, units
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
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.chosen import surveyed
from whalepy.dryrun.study import Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.cut import Part, cut_blocks
from whalepy.planner.schedule.actions import Crossing
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered
from whalepy.planner.schedule.simulate import simulate
from whalepy.runtime.build import Recipe
from whalepy.runtime.groups import start_process_group
from whalepy.runtime.measure_together import speed_together

BLOCKS = 8
KINDS = {"2 stages": (1.0, 0.5), "3 stages": (1.0, 0.5, 0.5)}
"""The speeds that are meant."""
CPU = torch.device("cpu")


@cache
def weights() -> tuple[float, ...]:
    """Floating-point operations of each block."""
    model, batch = made(ROWS, BLOCKS)
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model, loss_of), batch, "sgd", blocks)
        return surveyed(study, ClusterSpec.load("1xcpu")).flops


def planned_cut(speeds: Sequence[float]) -> list[int]:
    """Blocks of each stage for ranks of these speeds."""
    done = [0.0, *accumulate(weights())]
    sizes = cut_blocks([Part([[flops / speed for flops in done]]) for speed in speeds])
    assert sizes is not None
    return list(sizes)


def even_cut(stages: int) -> list[int]:
    """As many blocks in each, the first ones more."""
    each, more = divmod(BLOCKS, stages)
    return [each + (k < more) for k in range(stages)]


def simulated(sizes: Sequence[int], speeds: Sequence[float]) -> float:
    """What a step takes, in operations over speed, where messages take no time; backward is two thirds."""
    bounds, stages = [0, *accumulate(sizes)], range(len(sizes))
    each = [sum(weights()[a:b]) / speed for (a, b), speed in zip(pairwise(bounds), speeds, strict=True)]
    hosts = tuple((k,) for k in stages)
    crossings = [Crossing(k, k + 1, True) for k in stages[:-1]]
    schedule = lowered(compute_actions("1f1b", hosts, microbatches=MICROBATCHES), crossings, [])
    part = {"F": 1 / 3 / MICROBATCHES, "B": 2 / 3 / MICROBATCHES}
    return simulate(schedule, lambda action: each[action.stage] * part.get(action.op, 0.0)).step_s


def in_stages(sizes: Sequence[int]) -> Way:
    """The pipeline of one rank per stage."""
    model, batch = made(ROWS, BLOCKS)
    embedding, *blocks, head = units(model)
    bounds = [0, *accumulate(sizes)]
    groups = [blocks[a:b] for a, b in pairwise(bounds)]
    groups[0], groups[-1] = [embedding, *groups[0]], [*groups[-1], head]
    for group in groups:
        whalepy.annotate(model, dict.fromkeys(group, whalepy.stage()))
    options: dict[str, Any] = {"schedule": "1f1b", "microbatches": MICROBATCHES, "loss_fn": loss_of}
    parallel = whalepy.compile(model, f"{len(sizes)}xcpu", batch, **options)
    rows = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*rows), {"": parallel})


def on_rank(kind: str, limits: Limits) -> dict[str, Any]:
    """All figures of one kind. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core(min(dist.get_rank(), 1))
    meant = KINDS[kind]
    speeds: list[Any] = [None] * len(meant)
    dist.all_gather_object(speeds, speed_together(CPU, start_process_group(CPU)))
    planned, even = planned_cut(speeds), even_cut(len(meant))
    makes: dict[str, Make] = {"planned": partial(in_stages, planned), "even": partial(in_stages, even)}
    found = timed_ways(makes, partial(expected, ROWS, BLOCKS), limits)
    return {
        "kind": kind,
        "speeds": [round(speed / max(speeds), 3) for speed in speeds],
        "planned_blocks": ":".join(map(str, planned)),
        "even_blocks": ":".join(map(str, even)),
        "bound": round(simulated(even, meant) / simulated(planned, meant), 4),
        **gain(found.seconds["even"], found.seconds["planned"]),
        **found.rounds,
        "steps_ms": [list(pair) for pair in zip(*found.steps_ms().values(), strict=True)],
    }


def measured(kind: str, limits: Limits) -> dict[str, Any]:
    """The figures of one kind; the process that shares a core of two stages counts as no other."""
    if len(KINDS[kind]) > 2:
        return on_ranks(len(KINDS[kind]), on_rank, kind, limits)
    cores = sorted(os.sched_getaffinity(0))
    burning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(burning.pid, {cores[1]})
    try:
        return on_ranks(2, on_rank, kind, replace(limits, others=limits.others + 1 / (os.cpu_count() or 1)))
    finally:
        burning.kill()
        burning.wait()


def shown(row: dict[str, Any]) -> str:
    return (
        f"{row['kind']}: speeds {row['speeds']}, blocks {row['planned_blocks']} {row['planned_ms']:.1f} ms, "
        f"{row['even_blocks']} {row['other_ms']:.1f} ms, {row['gain']:.3f} x {within(row)}, bound {row['bound']:.3f}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: both")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before = machine()
    for kind in options.kind or KINDS:
        rows.append(measured(kind, limits_of(options)))
        print(shown(rows[-1]), flush=True)
    report(options.results, "unequal_stages", before, {"rows": rows})


if __name__ == "__main__":
    main()
