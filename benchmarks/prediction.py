"""Predicted against measured, on the CPU ranks of this machine: peak memory and time of a step.

    python -m benchmarks.prediction [--time] [--only WORDS] [--results FILE]

Each case is compiled on gloo ranks, each bound to one core, and trained for a few steps. Compared are
- tensors: the dry run's peak with the high-water mark of torch's allocator (its profiler sees every allocation);
- process: what `whalepy plan` says (tensors and what libraries hold) and the local model, which a rank on the CPU keeps
  beside its boxes, with all memory the process ever had resident (Linux: VmHWM). The C library is told to take large
  tensors from the system one by one: by default it leaves holes between them, which it neither fills nor gives back;
- time (--time; the machine must be quiet): the median of steps with the step played on a profile of this machine.
  Profile and steps take turns, since such a machine changes its speed. Ranks measure at the same time as many as there
  are cores; where there are more ranks than cores, each device has its part of the speed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import whalepy
from benchmarks.ways import on_ranks, own_core
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.shares import equal_rows
from whalepy.dryrun.study import Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import RankReport, report_this_rank
from whalepy.hardware.links import Link
from whalepy.hardware.profile_file import measured_spec
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.build import Recipe
from whalepy.runtime.groups import CPU, start_process_group
from whalepy.runtime.measure import EFFORTS, measure_device
from whalepy.runtime.measure_links import measure_links

MEGA = 1e6
STEPS = 4
ROUNDS = 5
# As `whalepy profile` measures, in a third of the time: the machine may change its speed at any moment.
EFFORT = replace(EFFORTS["cpu", False], seconds_per_point=0.1, dtypes=("float32",))
# Large tensors are taken from the system one by one and given back at once: a process holds what its tensors hold.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
# Small, so that no model diverges: products of numbers next to zero take ten times as long on these processors.
LEARNING_RATE = 1e-4


def gpt2(frozen: float = 0.0) -> tuple[nn.Module, dict[str, Any]]:
    """Eight layers of 512, 256 ids; the first `frozen` of the layers and the embeddings do not learn."""
    import transformers

    sizes = {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 8192, "n_positions": 256}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts))
    parameters = list(model.parameters())
    for parameter in parameters[: int(frozen * len(parameters))]:
        parameter.requires_grad_(False)
    ids = torch.randint(8192, (16, 256))
    return model, {"input_ids": ids, "labels": ids}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    """ResNet-50 on images of 96 pixels."""
    import transformers

    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=100))
    return model, {"pixel_values": torch.randn(16, 3, 96, 96), "labels": torch.arange(16) % 100}


@dataclass(frozen=True)
class Case:
    """What is trained, on how many ranks, under which scopes."""

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    world: int
    annotations: Callable[[], dict[str, Any]]
    optimizer: str = "adamw"


def _replicate(world: int) -> dict[str, Any]:
    return {"": whalepy.replicate(world)}


def _split(world: int) -> dict[str, Any]:
    return {"": whalepy.split(world)}


CASES = (
    Case("gpt2 replicate adamw", gpt2, 2, partial(_replicate, 2)),
    Case("gpt2 replicate sgd", gpt2, 2, partial(_replicate, 2), "sgd"),
    Case("gpt2 replicate frozen 90 %", partial(gpt2, 0.9), 2, partial(_replicate, 2)),
    Case("gpt2 split adamw", gpt2, 2, partial(_split, 2)),
    Case("gpt2 replicate adamw, 4 ranks", gpt2, 4, partial(_replicate, 4)),
    Case("resnet replicate adamw", resnet, 2, partial(_replicate, 2)),
    Case("resnet replicate sgd", resnet, 2, partial(_replicate, 2), "sgd"),
)


@dataclass(frozen=True)
class Round:
    """A profile of this machine and the steps that followed it."""

    report: RankReport
    link: Link
    step_s: float


@dataclass(frozen=True)
class Figures:
    """Of one rank."""

    tensor_bytes: int
    process_bytes: int
    local_model_bytes: int
    rounds: tuple[Round, ...]


def measured(case: Case, rounds: int) -> Figures:
    """On this rank: memory, and so many rounds of a profile and steps."""
    own_core()
    model, batch = case.make()
    local_model = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    whalepy.annotate(model, case.annotations())
    parallel = whalepy.compile(model, f"{case.world}xcpu", batch)
    del model
    gc.collect()
    own = parallel.local_batch(batch)
    trained = [parameter for parameter in parallel.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[case.optimizer](trained, lr=LEARNING_RATE, foreach=False)

    def step() -> None:
        parallel.train_step(**own)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(STEPS):
        step()
    process = status("VmHWM")
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    held = sum(value.nbytes for value in (*parallel.parameters(), *parallel.buffers(), *own.values(), *state))
    tensors = held + most_allocated(step)
    return Figures(tensors, process, local_model, tuple(a_round(step) for _ in range(rounds)))


def status(key: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def most_allocated(step: Callable[[], None]) -> int:
    """Bytes of tensors that a step allocates and holds at most at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    profiled: Any = seen.profiler
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def a_round(step: Callable[[], None]) -> Round:
    """A profile as `whalepy profile` makes it, then the median of a few steps."""
    host = start_process_group(CPU)
    measures = host.position < (os.cpu_count() or 1)
    report = report_this_rank(CPU, measure_device(CPU, effort=EFFORT) if measures else None)
    reports = gather_objects(host, report)
    links = measure_links(host, [other.host for other in reports], CPU)
    times: list[float] = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return Round(report, links.inside[report.host], statistics.median(times))


@dataclass(frozen=True)
class Predicted:
    """What the dry run says of rank 0."""

    tensor_bytes: int
    plan_bytes: int
    """What `whalepy plan` prints: tensors and what libraries hold."""
    steps_s: tuple[float, ...]
    """By cluster."""


def predicted(case: Case, clusters: Sequence[ClusterSpec]) -> Predicted:
    """The dry run's answer on these clusters, which differ in their figures alone."""
    model, batch = case.make()
    whalepy.annotate(model, case.annotations())
    study = Study.of(Recipe(model), batch, case.optimizer)
    candidates = [study.candidate(None, cluster, cluster.speeds(), 1) for cluster in clusters]
    first = candidates[0]
    rows = equal_rows(study.rows, first.replicas)
    steps = tuple(candidate.played(rows).step_s for candidate in candidates)
    return Predicted(first.work(0, rows[0]).peak, first.peak(0, rows[0]), steps)


def cluster_of(case: Case, found: Round) -> ClusterSpec:
    """As many devices as ranks, all of them like the one that was measured; more than cores share these."""
    data = measured_spec([found.report], {found.report.host: found.link}, None).to_dict()
    (node,) = data["nodes"]
    (device,) = node["devices"]
    speed = min(1.0, (os.cpu_count() or 1) / case.world)
    link = {"bandwidth": found.link.bandwidth_bytes_per_s, "latency_s": found.link.latency_s, "origin": "measured"}
    node |= {"devices": [device | {"count": case.world, "speed": speed}], "link": link}
    return ClusterSpec.load(data)


def compared(case: Case, *, timed: bool) -> dict[str, Any]:
    """One row of the results."""
    figures = on_fresh_ranks(case, 0, GIVEN_BACK)
    slow = on_fresh_ranks(case, ROUNDS, {}) if timed else None
    clusters = [cluster_of(case, found) for found in slow.rounds] if slow else [ClusterSpec.load(f"{case.world}xcpu")]
    said = predicted(case, clusters)
    row: dict[str, Any] = {
        "case": case.name,
        **beside("tensors", said.tensor_bytes / MEGA, figures.tensor_bytes / MEGA, "mb"),
        **beside("process", (said.plan_bytes + figures.local_model_bytes) / MEGA, figures.process_bytes / MEGA, "mb"),
    }
    if slow:
        steps = [found.step_s for found in slow.rounds]
        row |= beside("step", statistics.median(said.steps_s), statistics.median(steps), "s")
        row["rounds_s"] = [[round(a, 3), round(b, 3)] for a, b in zip(said.steps_s, steps, strict=True)]
    return row


def on_fresh_ranks(case: Case, rounds: int, malloc: dict[str, str]) -> Figures:
    """What rank 0 found, in fresh processes with these settings of the C library; without, `compile` sets them."""
    os.environ.update(malloc)
    try:
        return on_ranks(case.world, measured, case, rounds)
    finally:
        for name in malloc:
            os.environ.pop(name)


def beside(name: str, expected: float, seen: float, unit: str) -> dict[str, float]:
    """Both figures and their ratio."""
    return {
        f"{name}_predicted_{unit}": round(expected, 3),
        f"{name}_measured_{unit}": round(seen, 3),
        f"{name}_ratio": round(expected / seen, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="compare step times too; the machine must be quiet")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if options.only not in case.name:
            continue
        rows.append(compared(case, timed=options.time))
        print(rows[-1], flush=True)
    if options.results:
        made = {"date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        options.results.write_text(json.dumps({**made, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
