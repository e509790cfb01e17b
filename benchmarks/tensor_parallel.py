"""Blocks split over ranks against torch's parallelize_module, on gloo ranks of this machine.

    python -m benchmarks.tensor_parallel [--ranks N] [--rate 2gbit] [--pairs N] [--others SHARE] [--limit SECONDS]
                                         [--results FILE]

Two ranks, or `--ranks`, each on one core with one thread (more ranks than cores share them); 16 x 128 ids for the model
of benchmarks/blocks.py (4 blocks of width 256, vocabulary 4096), its product for queries, keys and values cut in three:
torch's plan splits a linear layer into neighbouring rows, which of one product for all three would be no whole heads. A
step is forward, backward, AdamW and forgetting the gradients. With `--rate` all ranks are hosts of their own with links
that send no faster (network namespaces; needs root). Three ways, in turns, each in processes of its own:
- own: whalepy with one split over the whole model;
- idle: the same, with nothing computed while bridges are under way (WHALEPY_OFF);
- torch: ColwiseParallel for queries, keys, values and hidden units, RowwiseParallel for what follows them and for the
  embedding, ColwiseParallel for the head, whose scores stay in parts in the loss (loss_parallel). What is between, such
  as norms, runs whole on all ranks.

Before anything is timed, loss and all gradients are compared with the local model. Ratios are seconds of own over
torch's, of one round. Bytes are those that all ranks send in a step, all collectives counted as they pass torch's
dispatcher, with the agreement on sizes (benchmarks/traffic.py says how).
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import scaled_dot_product_attention

import whalepy
from benchmarks import blocks, slow_links
from benchmarks.apart import Make, timed_ways
from benchmarks.blocks import HEADS, WIDTH, LanguageModel, loss_of
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


class Attention(nn.Module):
    """Causal attention after a norm, beside its input, for as many heads as the products make."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        products = (self.query(h), self.key(h), self.value(h))
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in products)
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def made() -> tuple[LanguageModel, tuple[Tensor, Tensor]]:
    """The same model and batch wherever it is called."""
    model, batch = blocks.made()
    for block in model.blocks:
        block.attention = Attention()
    return model, batch


OVERLAP = "asynchronous-bridges,gradients-during-bridges"


def own(off: str = "") -> Way:
    """This compiler's split."""
    os.environ["WHALEPY_OFF"] = off
    model, batch = made()
    whalepy.annotate(model, {"": whalepy.split(dist.get_world_size())})
    parallel = whalepy.compile(model, f"{dist.get_world_size()}xcpu", batch, loss_fn=loss_of)
    mine = parallel.local_batch(batch)
    step, optimizer = lambda: parallel.train_step(*mine), adamw(parallel.parameters())
    return Way(step, {"": parallel}, optimizer, parallel.full_gradients)


def theirs() -> Way:
    """torch's."""
    model, (ids, targets) = made()
    plan: dict[str, ParallelStyle] = {f"blocks.*.attention.{name}": ColwiseParallel() for name in ("query", "key")}
    plan |= {f"blocks.*.{name}": ColwiseParallel() for name in ("attention.value", "hidden.up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("attention.out", "hidden.down")}
    plan["embedding.ids"] = RowwiseParallel(input_layouts=Replicate())
    plan["head.logits"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)

    def step() -> Tensor:
        with loss_parallel():
            loss = loss_of(model(ids), targets)
            loss.backward()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    return Way(step, {"": model}, adamw(model.parameters()))


def on_rank(limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError for other numbers than the local model's, or without a round."""
    slow_links.open_group()
    own_core()
    makes: dict[str, Make] = {"own": own, "idle": partial(own, OVERLAP), "torch": theirs}
    return against(timed_ways(makes, lambda: local_gradients(*made()), limits, bytes_of), "own")


if __name__ == "__main__":
    parser = parser_of(__doc__)
    slow_links.add_rate(parser)
    add_ranks(parser)
    options = parser.parse_args()
    compare_ways("tensor_parallel", options, options.ranks, on_rank)
