"""A pipeline of two stages against torch.distributed.pipelining, on gloo ranks of this machine.

    python -m benchmarks.pipeline [--pairs N] [--others SHARE] [--limit SECONDS] [--results FILE]

Two ranks, each on one core with one thread, 8 microbatches, 1F1B and GPipe; a step is forward, backward and gradients
that are ready, of the model of benchmarks/blocks.py. torch's stages are made by hand on the same cut (embedding and two
blocks, two blocks and head), its outputs are not gathered. All three ways run in turns, each in processes of its own:
- even: the cut of torch, against torch;
- balanced: of all cuts between blocks the one whose stages differ least in counted floating-point operations (forward
  and backward; torch.utils.flop_counter), against torch on the even cut.

A round in which other processes took more than 5 % of the cores is repeated (`--others`).

Before anything is timed, loss and all gradients of each way are compared. Bytes are what stages send to each other in
a step; beside them every step agrees on its sizes (768 bytes per rank) and tells its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, schedules
from torch.utils.flop_counter import FlopCounterMode

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import BLOCKS, LanguageModel, loss_of, made
from benchmarks.pairs import figures, machine
from benchmarks.ways import (
    Limits,
    Way,
    expected,
    limits_of,
    on_ranks,
    own_core,
    parser_of,
    report,
    within,
)
from whalepy.runtime.parallel import ParallelModel

MICROBATCHES = 8
SCHEDULES: dict[str, type[schedules.PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
EVEN = BLOCKS // 2


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


def own(schedule: str, cut: int, world: int = 2) -> Way:
    """This compiler's pipeline."""
    model, batch = made()
    names = list(units(model))
    for group in (names[: cut + 1], names[cut + 1 :]):
        whalepy.annotate(model, dict.fromkeys(group, whalepy.stage()))
    options: dict[str, Any] = {"schedule": schedule, "microbatches": MICROBATCHES, "loss_fn": loss_of}
    parallel = whalepy.compile(model, f"{world}xcpu", batch, **options)
    rows = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*rows), {"": parallel})


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


# -- bytes ---------------------------------------------------------------------------------------------------------


def bytes_of(way: Way) -> int:
    """Bytes that both ranks send to each other's stages in a step."""
    sent = 0

    def counted(wrapped: Callable[..., Any], tensors: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += sum(tensor.nbytes for tensor in tensors(*args))
            return wrapped(*args, **kwargs)

        return call

    own = isinstance(way.modules.get(""), ParallelModel)
    place, name = (dist, "isend") if own else (schedules, "_batch_p2p")
    of: Callable[..., Sequence[Tensor]] = (lambda tensor, *_: [tensor]) if own else _sent
    with mock.patch.object(place, name, counted(getattr(place, name), of)):
        way.step()
    total = torch.tensor(sent)
    dist.all_reduce(total)
    return int(total)


def _sent(operations: Sequence[dist.P2POp], *_: Any) -> list[Tensor]:
    return [operation.tensor for operation in operations if operation.op is dist.isend]


# -- running -------------------------------------------------------------------------------------------------------


def on_rank(schedule: str, cut: int, limits: Limits) -> dict[str, Any]:
    """All figures of one schedule. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    makes: dict[str, Make] = {
        "even": partial(own, schedule, EVEN),
        "balanced": partial(own, schedule, cut),
        "torch": partial(theirs, schedule, EVEN),
    }
    found = timed_ways(makes, expected, limits, bytes_of)
    even, balanced, torchs = found.seconds.values()
    return {
        "schedule": schedule,
        "even": figures(even, torchs),
        "balanced": {"blocks": [cut, BLOCKS - cut], **figures(balanced, torchs)},
        **found.rounds,
        "bytes": found.known,
        "steps_ms": found.steps_ms(),
    }


def shown(row: dict[str, Any], of: str) -> str:
    one = row[of]
    return (
        f"{row['schedule']:5} {of:8} {one['own_ms']:8.1f} ms, torch {one['other_ms']:8.1f} ms, "
        f"ratio {one['ratio']:.3f} {within(one)}, {row['repeated_rounds']} repeated; "
        f"bytes {row['bytes'][of]}, torch {row['bytes']['torch']}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES), help="default: both")
    options = parser.parse_args()
    cut, rows, before = balanced(), [], machine()
    for schedule in options.schedule or SCHEDULES:
        rows.append(on_ranks(2, on_rank, schedule, cut, limits_of(options)))
        print(shown(rows[-1], "even"), shown(rows[-1], "balanced"), sep="\n", flush=True)
    report(options.results, "pipeline", before, {"rows": rows})


if __name__ == "__main__":
    main()
