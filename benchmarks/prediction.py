"""Predicted against measured, on the CPU ranks of this machine: peak memory and time of a step.

    python -m benchmarks.prediction [--time] [--results FILE]

Each case is compiled on gloo ranks and trained for a few steps; memory is the growth of the process to its high-water
mark (Linux: VmHWM) beyond what it held before the first step, plus the tensors it held then. Time needs a quiet
machine and is left out unless asked for: the median of steps, against a profile measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import whalepy
from tests.pool import Pool

MEGA = 1e6
STEPS = 4


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
class Figures:
    """Of one rank."""

    memory_bytes: int
    step_s: float


def measured(case: Case) -> Figures:
    """On this rank: growth of memory, and the median step."""
    from whalepy.dryrun.rehearse import OPTIMIZERS

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = case.make()
    whalepy.annotate(model, case.annotations())
    parallel = whalepy.compile(model, f"{case.world}xcpu", batch)
    own = parallel.local_batch(batch)
    trained = [parameter for parameter in parallel.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[case.optimizer](trained, foreach=False)
    del model
    held = sum(value.nbytes for value in (*parallel.parameters(), *parallel.buffers(), *own.values()))
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times: list[float] = []
    for _ in range(STEPS):
        start = time.perf_counter()
        parallel.train_step(**own)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return Figures(_status("VmHWM") - before + held, statistics.median(times[1:]))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def predicted(case: Case, cluster: Any) -> tuple[int, float]:
    """Bytes of tensors of rank 0 at its peak, and seconds of a step."""
    from whalepy.dryrun.study import Study
    from whalepy.runtime.build import Recipe

    model, batch = case.make()
    whalepy.annotate(model, case.annotations())
    study = Study.of(Recipe(model), batch, case.optimizer)
    candidate = study.candidate(None, cluster, cluster.speeds(), 1)
    rows = tuple(study.rows // candidate.replicas for _ in range(candidate.replicas))
    return candidate.work(0, rows[0]).peak, candidate.played(rows).step_s


def compared(case: Case, *, timed: bool) -> dict[str, Any]:
    """One row of the results. The pool is fresh: memory that a process keeps from before would not grow."""
    pool = Pool()
    try:
        figures = pool.run(case.world, measured, case, timeout_s=900)[0]
    finally:
        pool.close()
    memory, step = predicted(case, _cluster(case.world, timed=timed))
    row: dict[str, Any] = {
        "case": case.name,
        "predicted_mb": round(memory / MEGA, 1),
        "measured_mb": round(figures.memory_bytes / MEGA, 1),
        "memory_ratio": round(memory / figures.memory_bytes, 3),
    }
    if timed:
        row |= {"predicted_s": step, "measured_s": figures.step_s, "time_ratio": round(step / figures.step_s, 3)}
    return row


def _cluster(world: int, *, timed: bool) -> Any:
    from whalepy.hardware.cluster import ClusterSpec

    return ClusterSpec.load(f"{world}xcpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="compare step times too; the machine must be quiet")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows.append(compared(case, timed=options.time))
        print(rows[-1], flush=True)
    if options.results:
        made = {"date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        options.results.write_text(json.dumps({**made, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
