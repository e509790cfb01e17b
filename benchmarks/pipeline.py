"""A pipeline of two stages against torch.distributed.pipelining, on gloo ranks of this machine.

    python -m benchmarks.pipeline [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Two ranks, each on one core with one thread, 8 microbatches, 1F1B and GPipe; a step is forward, backward and gradients
that are ready, of the model of benchmarks/blocks.py. torch's stages are made by hand on the same cut (embedding and two
blocks, two blocks and head), its outputs are not gathered. All three ways run in turns, in the same processes:
- even: the cut of torch, against torch;
- balanced: of all cuts between blocks the one whose stages differ least in counted floating-point operations (forward
  and backward; torch.utils.flop_counter), against torch on the even cut.

A round in which other processes took more than 5 % of the cores is repeated (`--others`).

Before anything is timed, loss and all gradients of each way are compared. Bytes are what stages send to each other in
a step; beside them every step agrees on its sizes (768 bytes per rank) and tells its loss.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, schedules
from torch.utils.flop_counter import FlopCounterMode

import whalepy
from benchmarks.blocks import BLOCKS, ROWS, LanguageModel, loss_of, made
from benchmarks.pairs import OTHERS, figures, in_turns, machine
from benchmarks.prediction import own_core
from tests.pool import Pool
from whalepy.runtime.parallel import ParallelModel

MICROBATCHES = 8
SCHEDULES: dict[str, type[schedules.PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
EVEN = BLOCKS // 2
# Of sums of another order in float32; relative to the largest gradient.
TOLERANCE = 1e-5


# -- cuts ----------------------------------------------------------------------------------------------------------


def units(model: LanguageModel) -> dict[str, nn.Module]:
    """What a cut does not go through, by its name, in order."""
    blocks = {f"blocks.{k}": block for k, block in enumerate(model.blocks)}
    return {"embedding": model.embedding, **blocks, "head": model.head}


def balanced() -> int:
    """How many blocks the first stage has where the larger stage has fewest operations; ties to the first."""
    model, (ids, targets) = made()
    counts: list[int] = []
    x: Tensor = ids
    for name, unit in units(model).items():
        x = x.detach().requires_grad_(x.is_floating_point())
        with FlopCounterMode(display=False) as counter:
            y = unit(x)
            (loss_of(y, targets) if name == "head" else y.sum()).backward()
        counts.append(counter.get_total_flops())
        x = y
    sides = {cut: (sum(counts[: cut + 1]), sum(counts[cut + 1 :])) for cut in range(BLOCKS + 1)}
    print("operations of both stages by blocks of the first:", {k: [f"{n:.3g}" for n in v] for k, v in sides.items()})
    return min(sides, key=lambda cut: max(sides[cut]))


# -- the two ways --------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to train."""

    step: Callable[[], Tensor | None]
    """The loss, where it is known."""
    modules: dict[str, nn.Module]
    """What holds the parameters, by the prefix of their names in the whole model."""

    def forget(self) -> None:
        """No gradients."""
        for module in self.modules.values():
            module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Of this rank, by the name of the parameter in the whole model."""
        named = {f"{at}.{name}".strip("."): p for at, m in self.modules.items() for name, p in m.named_parameters()}
        return {name: p.grad for name, p in named.items() if p.grad is not None}


def own(schedule: str, cut: int, world: int = 2) -> tuple[Way, ParallelModel]:
    """This compiler's pipeline."""
    model, batch = made()
    names = list(units(model))
    for group in (names[: cut + 1], names[cut + 1 :]):
        whalepy.annotate(model, dict.fromkeys(group, whalepy.stage()))
    options: dict[str, Any] = {"schedule": schedule, "microbatches": MICROBATCHES, "loss_fn": loss_of}
    parallel = whalepy.compile(model, f"{world}xcpu", batch, **options)
    rows = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*rows), {"": parallel}), parallel


def theirs(schedule: str, cut: int) -> Way:
    """torch's pipeline of two stages."""
    model, (ids, targets) = made()
    rank, named = dist.get_rank(), units(model)
    mine = list(named)[: cut + 1] if rank == 0 else list(named)[cut + 1 :]
    kept = {name: named[name] for name in mine}
    stage = PipelineStage(nn.Sequential(*kept.values()), rank, 2, torch.device("cpu"))
    played = SCHEDULES[schedule](stage, MICROBATCHES, loss_fn=loss_of)

    def step() -> Tensor | None:
        losses: list[Tensor] = []
        if rank == 0:
            played.step(ids, return_outputs=False)
            return None
        played.step(target=targets, losses=losses, return_outputs=False)
        return torch.stack(losses).mean()

    return Way(step, kept)


# -- the same numbers, and bytes -----------------------------------------------------------------------------------


def differences(way: Way, loss: Tensor, gradients: dict[str, Tensor]) -> list[str]:
    """What differs between a step of this way and the local model, on any rank."""
    way.forget()
    found = way.step()
    wrong = (
        [] if found is None or abs(float(found - loss)) <= TOLERANCE * float(loss) else [f"loss {found}, not {loss}"]
    )
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    mine = way.gradients()
    for name, gradient in mine.items():
        off = float((gradient - gradients[name]).abs().max()) / scale
        wrong += [f"gradient of {name} is off by {off:.1e}"] if off > TOLERANCE else []
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (list(mine), wrong))
    missing = set(gradients) - {name for names, _ in everyone for name in names}
    return [text for _, texts in everyone for text in texts] + [f"no gradient of {name}" for name in sorted(missing)]


def expected(rows: int = ROWS, blocks: int = BLOCKS) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the local model."""
    model, (ids, targets) = made(rows, blocks)
    loss = loss_of(model(ids), targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bytes_of(step: Callable[[], Any], *, torchs: bool) -> int:
    """Bytes that both ranks send to each other's stages in a step."""
    sent = 0

    def counted(wrapped: Callable[..., Any], tensors: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += sum(tensor.nbytes for tensor in tensors(*args))
            return wrapped(*args, **kwargs)

        return call

    place, name = (schedules, "_batch_p2p") if torchs else (dist, "isend")
    of: Callable[..., Sequence[Tensor]] = _sent if torchs else lambda tensor, *_: [tensor]
    with mock.patch.object(place, name, counted(getattr(place, name), of)):
        step()
    total = torch.tensor(sent)
    dist.all_reduce(total)
    return int(total)


def _sent(operations: Sequence[dist.P2POp], *_: Any) -> list[Tensor]:
    return [operation.tensor for operation in operations if operation.op is dist.isend]


# -- running -------------------------------------------------------------------------------------------------------


def on_rank(schedule: str, cut: int, pairs: int, others: float, limit_s: float) -> dict[str, Any]:
    """All figures of one schedule. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    warnings.simplefilter("ignore")
    loss, gradients = expected()
    ways = {"even": own(schedule, EVEN)[0], "balanced": own(schedule, cut)[0], "torch": theirs(schedule, EVEN)}
    wrong = {name: differences(way, loss, gradients) for name, way in ways.items()}
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
        "schedule": schedule,
        "even": figures(times["even"], times["torch"]),
        "balanced": {"blocks": [cut, BLOCKS - cut], **figures(times["balanced"], times["torch"])},
        "repeated_rounds": repeated,
        "others_at_most": others,
        "bytes": {name: bytes_of(way.step, torchs=name == "torch") for name, way in ways.items()},
        "steps_ms": {name: [round(1e3 * one, 2) for one in each] for name, each in times.items()},
    }


def on_ranks(world: int, fn: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 found, in fresh processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = Pool()
    try:
        return pool.run(world, partial(fn, *args), timeout_s=1800)[0]
    finally:
        pool.close()


def shown(row: dict[str, Any], of: str) -> str:
    one = row[of]
    low, high = one["interval"]
    return (
        f"{row['schedule']:5} {of:8} {one['own_ms']:8.1f} ms, torch {one['other_ms']:8.1f} ms, "
        f"ratio {one['ratio']:.3f} [{low:.3f}, {high:.3f}] in {one['pairs']} pairs, "
        f"{row['repeated_rounds']} repeated; "
        f"bytes {row['bytes'][of]}, torch {row['bytes']['torch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES), help="default: both")
    parser.add_argument("--others", type=float, default=OTHERS, help="share of the cores that others may take")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which no pairs are added")
    parser.add_argument("--results", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    cut, rows, before = balanced(), [], machine()
    for schedule in options.schedule or SCHEDULES:
        rows.append(on_ranks(2, on_rank, schedule, cut, options.pairs, options.others, options.limit))
        print(shown(rows[-1], "even"), shown(rows[-1], "balanced"), sep="\n", flush=True)
    made_of = {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.pipeline", **before}
    print(f"load before {before['load']}, after {machine()['load']}")
    if options.results:
        options.results.write_text(json.dumps({**made_of, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
