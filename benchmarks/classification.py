"""ResNet-50 with 100,000 classes on 4 ranks: the head split by classes against data parallelism.

    python -m benchmarks.classification [--rate 1gbit] [--classes N] [--pairs N] [--results FILE]

Four gloo ranks with one thread each share the cores of this machine; 16 images of 64 pixels for the ResNet-50 of
`transformers`. A step is forward, backward and gradients that are ready. In turns, in the same processes:
- hybrid: the body replicated, the head split by classes over the same ranks (Whale, section 2 and figure 11);
- data: all replicated;
- both without any exchange: each rank its rows of the body, and all of the head for its rows (data), or its classes of
  the head for all rows (hybrid), in plain torch.

`bound` is what these times and the bytes allow: (computing + bytes over bandwidth) of data over that of hybrid, with
the bandwidth of all-reduces of 64 MB in the same processes. Before anything is timed, loss and gradients of both are
compared; batch norms take the rows of their rank in both. With `--rate` every rank is a host of its own whose link
sends no faster (network namespaces; needs root).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from transformers import ResNetConfig, ResNetForImageClassification

import whalepy
from benchmarks import slow_links
from benchmarks.pairs import in_turns, machine, timed
from benchmarks.traffic import bytes_moved
from benchmarks.ways import TOLERANCE, Limits, gain, limits_of, on_ranks, own_core, parser_of, report, within
from whalepy.runtime.parallel import ParallelModel

RANKS, IMAGES, PIXELS = 4, 16, 64
HEAD = "classifier.1.weight"
Batch = dict[str, Tensor]
Step = Callable[[], Any]


def made(classes: int) -> tuple[nn.Module, Batch]:
    """The same model and batch wherever it is called."""
    torch.manual_seed(0)
    sizes: Any = {"num_labels": classes, "problem_type": "single_label_classification"}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator)
    return model, {"pixel_values": images, "labels": torch.randint(classes, (IMAGES,), generator=generator)}


def compiled(classes: int, scopes: dict[str, Any]) -> tuple[ParallelModel, nn.Module, Batch]:
    """Under these scopes; the local model without its values, and this rank's rows."""
    model, batch = made(classes)
    parallel = whalepy.compile(whalepy.annotate(model, scopes), f"{RANKS}xcpu", batch)
    return parallel, model.to("meta"), parallel.local_batch(batch)


def alone_data(parallel: ParallelModel, model: nn.Module, rows: Batch) -> Step:
    """The whole model on the rows of this rank, in its own parameters."""
    buffers = {name: buffer.clone() for name, buffer in parallel.named_buffers()}
    values = {**dict(parallel.named_parameters()), **buffers}
    return lambda: functional_call(model, values, (), rows).loss.backward()


def alone_hybrid(classes: int, rows: Batch) -> Step:
    """The body on the rows of this rank, the head for its classes on as many rows as all have."""
    model, batch = made(classes // RANKS)
    body: Any = model.get_submodule("resnet")
    head = model.get_submodule("classifier")

    def step() -> None:
        features = body(rows["pixel_values"]).pooler_output
        everyone = torch.cat([features] * RANKS)[:IMAGES]
        nn.functional.cross_entropy(head(everyone), batch["labels"]).backward()
        model.zero_grad()

    return step


def differences(hybrid: ParallelModel, data: ParallelModel, steps: dict[str, Step]) -> list[str]:
    """What differs between the two: the loss, or gradients that this rank has of both."""
    losses = [float(steps[name]()) for name in ("hybrid", "data")]
    off = abs(losses[0] - losses[1]) / abs(losses[1])
    wrong = [f"losses {losses}"] if off > TOLERANCE else []
    theirs = {name: p.grad for name, p in data.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, parameter in hybrid.named_parameters():
        whole, own = theirs[name], parameter.grad
        assert own is not None
        if own.shape != whole.shape:
            counts: list[Any] = [None] * RANKS
            dist.all_gather_object(counts, own.shape[0])
            start = sum(counts[: dist.get_rank()])
            whole = whole[start : start + own.shape[0]]
        apart = float((own - whole).abs().max()) / scale
        wrong += [f"gradient of {name} is off by {apart:.1e}"] if apart > TOLERANCE else []
    return wrong


def bandwidth(size: int = 64 * 2**20) -> float:
    """Bytes per second that each rank sends in an all-reduce of so many bytes."""
    tensor, times = torch.zeros(size // 4), list[float]()
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - start)
    return 2 * (RANKS - 1) / RANKS * size / statistics.median(times)


def on_rank(classes: int, limits: Limits) -> dict[str, Any]:
    """All figures. Raises ValueError where both ways differ, or without a round."""
    slow_links.open_group()
    own_core()
    warnings.simplefilter("ignore")
    hybrid, _, mine = compiled(classes, {"resnet": whalepy.replicate(), "classifier": whalepy.split(on=f"{HEAD}:0")})
    data, model, rows = compiled(classes, {"": whalepy.replicate()})
    steps: dict[str, Step] = {
        "hybrid": lambda: hybrid.train_step(**mine),
        "data": lambda: data.train_step(**rows),
        "hybrid alone": alone_hybrid(classes, rows),
        "data alone": alone_data(data, model, rows),
    }
    wrong = differences(hybrid, data, steps)
    if wrong:
        raise ValueError(f"not the same loss and gradients: {wrong}")

    def forget() -> None:
        hybrid.zero_grad()
        data.zero_grad()

    moved = {}
    for name in ("hybrid", "data"):
        forget()
        moved[name] = bytes_moved(steps[name])
    rate = bandwidth()
    turns = [partial(timed, step, forget) for step in steps.values()]
    found, repeated = in_turns(turns, limits.pairs, warm=1, others=limits.others, limit_s=limits.limit_s)
    seconds = dict(zip(steps, found, strict=True))
    least = {
        name: statistics.median(seconds[f"{name} alone"]) + moved[name] / RANKS / rate for name in ("hybrid", "data")
    }
    one = gain(seconds["data"], seconds["hybrid"])
    bound = least["data"] / least["hybrid"]
    return {
        "classes": classes,
        "traffic": round(moved["hybrid"] / moved["data"], 4),
        "bytes": moved,
        "bandwidth_bytes_per_s": round(rate),
        "bound": round(bound, 3),
        "of_bound": round(one["gain"] / bound, 3),
        **one,
        "repeated_rounds": repeated,
        "steps_ms": {name: [round(1e3 * s, 1) for s in each] for name, each in seconds.items()},
    }


def main() -> None:
    parser = parser_of(__doc__)
    slow_links.add_rate(parser)
    parser.add_argument("--classes", type=int, default=100_000)
    options = parser.parse_args()
    before = machine()
    with slow_links.hosts(RANKS, options.rate):
        row = on_ranks(RANKS, on_rank, options.classes, limits_of(options), default_group=options.rate is None)
    print(
        f"hybrid {row['planned_ms']:.0f} ms, data parallel {row['other_ms']:.0f} ms: {row['gain']:.2f} x {within(row)}"
    )
    print(f"{row['of_bound']:.2f} of the bound {row['bound']:.2f}; traffic {row['traffic']:.4f}, bytes {row['bytes']}")
    report(options.results, "classification", before, {"rate": options.rate, **row})


if __name__ == "__main__":
    main()
