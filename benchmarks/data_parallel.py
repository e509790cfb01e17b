"""Data parallelism on equal ranks against DistributedDataParallel and FSDP2, on gloo ranks of this machine.

    python -m benchmarks.data_parallel [--ranks N] [--model NAME] [--rows N] [--pairs N] [--others SHARE]
                                       [--limit SECONDS] [--results FILE]

Two ranks, or `--ranks`, each on one core with one thread (more ranks than cores share them); 16 x 128 ids for the model
of benchmarks/blocks.py (4 blocks of width 256, vocabulary 4096), or GPT-2 of 124M parameters (`--model gpt2`). A step
is forward, backward, AdamW and forgetting the gradients. Three ways, in turns, each in processes of its own:
- own: whalepy with one replicate level;
- ddp: torch's DistributedDataParallel, as it comes;
- fsdp: torch's fully_shard over each block, then over the rest.

Before anything is timed, loss (where a rank knows that of the whole batch) and all gradients are compared with the
local model. Ratios are seconds of own over the other's, of one round. Bytes are those that all ranks send in a step,
all collectives counted as they pass torch's dispatcher, with the agreement on sizes (benchmarks/traffic.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import whalepy
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import MODELS, ROWS, loss_of
from benchmarks.traffic import bytes_of
from benchmarks.ways import (
    Limits,
    Way,
    adamw,
    add_ranks,
    against,
    compare_ways,
    local_gradients,
    own_core,
    parser_of,
)


def own(rows: int, name: str) -> Way:
    """This compiler's replicas."""
    model, batch = MODELS[name](rows)
    whalepy.annotate(model, {"": whalepy.replicate()})
    parallel = whalepy.compile(model, f"{dist.get_world_size()}xcpu", batch, loss_fn=loss_of)
    mine = parallel.local_batch(batch)
    return Way(lambda: parallel.train_step(*mine), {"": parallel})


def ddp(rows: int, name: str = "blocks") -> Way:
    """torch's data parallelism; gradients and loss are means over ranks, which have equally many rows."""
    model, (ids, targets) = MODELS[name](rows)
    parallel, each = DistributedDataParallel(model), rows_of_rank(rows)

    def step() -> None:
        loss_of(parallel(ids[each]), targets[each]).backward()

    return Way(step, {"": model})


def fsdp(rows: int, name: str = "blocks") -> Way:
    """The same with every parameter in parts over the ranks."""
    model, (ids, targets) = MODELS[name](rows)
    mesh, each = init_device_mesh("cpu", (dist.get_world_size(),)), rows_of_rank(rows)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)

    def step() -> None:
        loss_of(model(ids[each]), targets[each]).backward()

    return Way(step, {"": model})


def rows_of_rank(rows: int) -> slice:
    """Equally many rows for each rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * rows // world, (rank + 1) * rows // world)


def trained(way: Callable[[int, str], Way], rows: int, name: str) -> Way:
    """With its optimizer."""
    made = way(rows, name)
    return replace(made, optimizer=adamw(made.modules[""].parameters()))


def on_rank(rows: int, name: str, limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    own_core()
    makes: dict[str, Make] = {way.__name__: partial(trained, way, rows, name) for way in (own, ddp, fsdp)}
    return against(timed_ways(makes, lambda: local_gradients(*MODELS[name](rows)), limits, bytes_of), "own")


def main() -> None:
    parser = parser_of(__doc__)
    add_ranks(parser)
    parser.add_argument("--model", choices=MODELS, default="blocks")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the global batch; a multiple of the ranks")
    options = parser.parse_args()
    compare_ways("data_parallel", options, options.ranks, partial(on_rank, options.rows, options.model))


if __name__ == "__main__":
    main()
