"""A stand-in for M6 at ten billion parameters: 24 layers that encode, 24 that decode, in eight stages, replicated.

    whalepy plan examples/m6.py:annotated --cluster "8x8xV100-SXM2-32GB @ 50Gbit/s" \
        --batch-size 280 --microbatches 35 --recompute full --precision fp16
    python examples/m6.py                # the same on 64 and on 256 V100, beside the paper's outcome

The paper (Whale, USENIX ATC 2022) trains M6-10B in eight stages with 35 microbatches inside data parallelism, and keeps
91 % of the throughput of a GPU from 64 to 256 of them. It gives neither width nor batch: 3,840 makes ten billion
parameters of 24 + 24 layers, and a microbatch is one pair of sequences of 512 tokens here.

Mixtures of experts of 100 billion, one and ten trillion parameters are lists of costs beside this file:

    whalepy plan layers:examples/m6-100b.yaml --cluster "16x8xV100-SXM2-32GB @ 50Gbit/s" --replicate 1 --split 128
    python examples/m6.py --mixtures     # these, on 128, 480 and 512 V100

With Adam a trillion parameters take 16 bytes each, 43.0 of 31.8 GiB on each of 480 cards with activations: with SGD,
which keeps no state, it is 29.8 GiB.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import whalepy
from whalepy.dryrun.run import Request, run
from whalepy.dryrun.run_described import run_described
from whalepy.planner.forecast import Forecast
from whalepy.primitives import Primitive

STAGES, MICROBATCHES, PER_NODE, LINK = 8, 35, 8, "50Gbit/s"
PAPER = 0.91  # of the throughput of a GPU, from 64 to 256
# File, nodes, optimizer, and what was done on as many V100-32GB. Source: abstracts of Whale and of arXiv:2110.03888.
MIXTURES = (
    ("m6-100b.yaml", 16, "adamw", "trained"),
    ("m6-1t.yaml", 60, "sgd", "trained"),
    ("m6-10t.yaml", 64, "sgd", "trained in 10 days, parameters in the memory of the hosts"),
)


@dataclass(frozen=True)
class Sizes:
    """Of the model; `layers` encode, and as many decode."""

    layers: int = 24
    width: int = 3840
    heads: int = 30
    words: int = 21_128  # of BERT's Chinese vocabulary
    tokens: int = 512


class Attention(nn.Module):
    """f32[rows, tokens, width] looks at f32[rows, others, width]"""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query, self.key, self.value, self.out = (nn.Linear(sizes.width, sizes.width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(seen), self.value(seen))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, attention to what was encoded where the layer decodes, and an MLP of four times the width."""

    def __init__(self, sizes: Sizes, *, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        self.attention, self.attention_norm = Attention(sizes), nn.LayerNorm(sizes.width)
        if decodes:
            self.cross, self.cross_norm = Attention(sizes), nn.LayerNorm(sizes.width)
        self.up, self.down = nn.Linear(sizes.width, 4 * sizes.width), nn.Linear(4 * sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h, causal=self.decodes)
        if encoded is not None:
            x = x + self.cross(self.cross_norm(x), encoded)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class M6(nn.Module):
    """Ids of what is seen and of what is said -> the loss of saying it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.seen, self.said = nn.Embedding(sizes.words, sizes.width), nn.Embedding(sizes.words, sizes.width)
        self.encoder = nn.ModuleList(Layer(sizes, decodes=False) for _ in range(sizes.layers))
        self.decoder = nn.ModuleList(Layer(sizes, decodes=True) for _ in range(sizes.layers))
        self.words = nn.Linear(sizes.width, sizes.words)

    def forward(self, seen: Tensor, said: Tensor) -> Tensor:
        encoded = self.seen(seen)
        for layer in self.encoder:
            encoded = layer(encoded)
        x = self.said(said)
        for layer in self.decoder:
            x = layer(x, encoded)
        return nn.functional.cross_entropy(self.words(x).flatten(0, 1), said.flatten())


def annotated(
    sizes: Sizes = Sizes(), stages: int = STAGES, placement: list[list[int]] | None = None
) -> tuple[M6, tuple[Tensor, Tensor]]:
    """The model in stages of equal numbers of layers, replicated on what devices there are; a batch for one copy.

    `placement`: the devices of each stage; without, neighbours are of one stage.
    """
    model = M6(sizes)
    layers = [f"{part}.{k}" for part in ("encoder", "decoder") for k in range(sizes.layers)]
    each = len(layers) // stages
    placed = [] if placement is None else [whalepy.cluster(placement=placement)]
    scopes: dict[str, tuple[Primitive, ...]] = {"": (*placed, whalepy.replicate())}
    for first in range(0, len(layers), each):
        scopes |= dict.fromkeys(layers[first : first + each], (whalepy.stage(),))
    whalepy.annotate(model, scopes)
    ids = torch.zeros(MICROBATCHES, sizes.tokens, dtype=torch.long)
    return model, (ids, ids.clone())


def forecast(nodes: int) -> Forecast:
    """What `whalepy plan` says for so many nodes of eight V100, a microbatch of one row on every copy."""
    request = Request(
        f"{__file__}:annotated",
        cluster_of(nodes),
        rows=nodes * MICROBATCHES,
        microbatches=MICROBATCHES,
        recompute="full",
        precision="fp16",
        keeps_plan=False,
    )
    return run(request, lambda text: None)[0]


def mixture(file: str, nodes: int, optimizer: str) -> Forecast:
    """What it says of a mixture of experts whose experts are split over all devices."""
    path, count = Path(__file__).with_name(file), nodes * PER_NODE
    asked = Request(
        f"layers:{path}", cluster_of(nodes), replicate=1, split=count, optimizer=optimizer, keeps_plan=False
    )
    return run_described(asked, lambda text: None)[0]


def cluster_of(nodes: int) -> str:
    return f"{nodes}x{PER_NODE}xV100-SXM2-32GB @ {LINK}"


def told(devices: int, found: Forecast) -> str:
    """`64 V100: tight, 4.66 s a step, 28.9 of 31.8 GiB`"""
    tightest = found.devices[found.tightest]
    memory = f"{tightest.peak_memory_bytes / 2**30:.1f} of {tightest.memory_capacity_bytes / 2**30:.1f} GiB"
    return f"{devices} V100: {found.verdict}, {found.step_time_s:.2f} s a step, {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan stand-ins for M6 on nodes of eight V100-32GB.")
    parser.add_argument("--nodes", type=int, nargs=2, default=(8, 32), help="fewer and more; the paper's are 8 and 32")
    parser.add_argument("--mixtures", action="store_true", help="mixtures of experts instead")
    options = parser.parse_args()
    if options.mixtures:
        for file, nodes, optimizer, outcome in MIXTURES:
            shown = told(nodes * PER_NODE, mixture(file, nodes, optimizer))
            print(f"{file} ({optimizer}) on {shown}; M6: {outcome}", flush=True)
        return
    fewer, more = options.nodes
    rates: list[float] = []
    for nodes in (fewer, more):
        found = forecast(nodes)
        rates.append(nodes * MICROBATCHES / found.step_time_s / (nodes * PER_NODE))
        print(told(nodes * PER_NODE, found), flush=True)
    print(f"of the throughput of a GPU is kept: {rates[1] / rates[0]:.1%}; the paper, from 64 to 256 V100: {PAPER:.0%}")


if __name__ == "__main__":
    main()
