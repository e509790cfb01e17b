"""Ways to train one model, on ranks of this machine: bound to cores, compared with the local model, timed in turns.

What benchmarks that compare ways of training share, with their options and their files of results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks import slow_links
from benchmarks.blocks import BLOCKS, ROWS, loss_of, made
from benchmarks.pairs import OTHERS, figures, machine
from tests.pool import Pool

# Of sums of another order in float32; relative to the largest gradient.
TOLERANCE = 1e-5


# -- ranks ---------------------------------------------------------------------------------------------------------


def own_core(core: int | None = None) -> None:
    """Bind this rank to one core, by default to that of its number, and torch to one thread."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(dist.get_rank() if core is None else core) % len(cores)]})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


def on_ranks(world: int, fn: Callable[..., Any], *args: Any, default_group: bool = True) -> Any:
    """What rank 0 found, in fresh processes; without a default group it opens one itself."""
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = Pool()
    try:
        return pool.run(world, partial(fn, *args), timeout_s=1800, default_group=default_group)[0]
    finally:
        pool.close()


Local = tuple[Tensor, dict[str, Tensor]]
"""Loss and gradients of the local model, by the name of the parameter."""


# -- ways ----------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to train."""

    step: Callable[[], Tensor | None]
    """Forward and backward; the loss, where it is known."""
    modules: dict[str, nn.Module]
    """What holds the parameters, by the prefix of their names in the whole model."""
    optimizer: torch.optim.Optimizer | None = None
    """With one, it is part of what is timed."""
    full_gradients: Callable[[], Mapping[str, Tensor | None]] | None = None
    """Makes them whole, where parameters are in parts. Collective."""

    def train(self) -> None:
        """What is timed."""
        self.step()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def forget(self) -> None:
        """No gradients."""
        for module in self.modules.values():
            module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Of this rank, by the name of the parameter in the whole model."""
        if self.full_gradients is not None:
            return {name: gradient for name, gradient in self.full_gradients().items() if gradient is not None}
        named = {f"{at}.{name}".strip("."): p for at, m in self.modules.items() for name, p in m.named_parameters()}
        return {name: _whole(p.grad) for name, p in named.items() if p.grad is not None}


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of full training steps; so slow that no loss diverges while steps are timed."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def expected(rows: int = ROWS, blocks: int = BLOCKS) -> Local:
    """Loss and gradients of the local model."""
    return local_gradients(*made(rows, blocks))


def local_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Local:
    """Loss and gradients of this model in one process."""
    ids, targets = batch
    loss = loss_of(model(ids), targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


# -- times ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How many rounds are timed, what share of the cores others may take, and seconds after which none is added."""

    pairs: int
    others: float
    limit_s: float


@dataclass(frozen=True)
class Timed:
    """Seconds of each way, round by round."""

    seconds: dict[str, list[float]]
    rounds: dict[str, Any]
    """How many were repeated, and why."""
    known: dict[str, Any]
    """What was asked about each way."""

    def steps_ms(self) -> dict[str, list[float]]:
        return {name: [round(1e3 * one, 2) for one in each] for name, each in self.seconds.items()}


def gain(other: Sequence[float], planned: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as the other way, with the interval of the median."""
    found = figures(other, planned)
    return {
        "planned_ms": found["other_ms"],
        "other_ms": found["own_ms"],
        "gain": found["ratio"],
        "interval": found["interval"],
        "pairs": found["pairs"],
    }


def against(found: Timed, own: str) -> dict[str, Any]:
    """Figures of one way against each other one, and the bytes that each moves in a step, where those were asked."""
    others = {name: figures(found.seconds[own], each) for name, each in found.seconds.items() if name != own}
    bytes_of = {"bytes": found.known} if any(found.known.values()) else {}
    return {"against": others, **found.rounds, **bytes_of, "steps_ms": found.steps_ms()}


def shown_against(row: Mapping[str, Any]) -> str:
    """A line for each other way, and one for all bytes."""
    lines = [
        f"own {one['own_ms']:8.1f} ms, {name:6} {one['other_ms']:8.1f} ms, ratio {one['ratio']:.3f} {within(one)}"
        for name, one in row["against"].items()
    ]
    lines += ["bytes " + ", ".join(f"{name} {count}" for name, count in row["bytes"].items())] if "bytes" in row else []
    return "\n".join([*lines, f"{row['repeated_rounds']} rounds repeated"])


def within(one: Mapping[str, Any]) -> str:
    """`[0.931, 1.027] in 25 pairs`"""
    low, high = one["interval"]
    return f"[{low:.3f}, {high:.3f}] in {one['pairs']} pairs"


# -- options and results -------------------------------------------------------------------------------------------


def parser_of(description: str | None, *, pairs: bool = True) -> argparse.ArgumentParser:
    """The options that all have: `--results`, and those of rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if pairs:
        parser.add_argument("--pairs", type=int, default=25)
        parser.add_argument("--others", type=float, default=OTHERS, help="share of the cores that others may take")
        parser.add_argument("--limit", type=float, default=400.0, help="seconds after which no pairs are added")
    parser.add_argument("--results", type=Path, help="write the figures as JSON")
    return parser


def limits_of(options: argparse.Namespace) -> Limits:
    return Limits(options.pairs, options.others, options.limit)


def report(path: Path | None, name: str, before: dict[str, Any], found: dict[str, Any], remark: str = "") -> None:
    """Print the load, and write the figures with date, command and machine where there is a path."""
    print(f"{remark}load before {before['load']}, after {machine()['load']}")
    if path:
        command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
        made_of = {"date": datetime.date.today().isoformat(), "command": command}
        path.write_text(json.dumps({**made_of, **before, **found}, indent=1) + "\n")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that run on any number."""
    parser.add_argument("--ranks", type=int, default=2)


def compare_ways(
    name: str, options: argparse.Namespace, ranks: int, on_rank: Callable[[Limits], dict[str, Any]]
) -> None:
    """The whole of a benchmark whose ranks find what `against` gives."""
    before, rate = machine(), getattr(options, "rate", None)
    with slow_links.hosts(ranks, rate):
        row = on_ranks(ranks, on_rank, limits_of(options), default_group=rate is None)
    print(shown_against(row))
    report(options.results, name, before, row if rate is None else {"rate": rate, **row})
