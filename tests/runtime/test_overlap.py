"""What runs while bridges are under way changes no number, and does run then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests import models
from tests.exactness import Run, compare, differences
from tests.pool import Pool
from tests.rewrite.test_overlap import bias_read_twice, towers
from whalepy.rewrite.deferring import Owed, Queue
from whalepy.runtime import reduction
from whalepy.runtime.bridge import Move
from whalepy.runtime.groups import Group, Pending


def by_heads() -> dict[str, Any]:
    return {"": whalepy.split(2, shares=[3, 1])}


def nested() -> dict[str, Any]:
    return {"": [whalepy.replicate(2), whalepy.split(2)]}


class Balanced(nn.Module):
    """A number that the first stage computes over all rows, as mixtures of experts do, goes to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        balance = h.square().mean().exp()
        return 0.1 * balance + (self.second(h.tanh()) * balance).square().mean()


def balanced() -> models.Made:
    torch.manual_seed(0)
    return Balanced(), [(torch.randn(6, 8),)]


def in_stages() -> dict[str, Any]:
    first, second = ([whalepy.stage(2), whalepy.replicate(2)] for _ in range(2))
    return {"first": first, "second": second}


DTYPE = torch.float32
"""Another one has other layouts, and bridges at other places."""
CASES = {
    "towers": (towers, by_heads, 2),
    "towers, nested": (towers, nested, 4),
    "llama": (lambda: models.llama(layers=2), by_heads, 2),
    "a bias read twice": (bias_read_twice, nested, 4),
    "gpt2, rows": (lambda: models.gpt2(layers=2), lambda: {"": whalepy.replicate(2, shares=[3, 1])}, 2),
    "gpt2, nested": (lambda: models.gpt2(layers=2), nested, 4),
}


@contextmanager
def without(what: str) -> Iterator[None]:
    """With this turned off, and gradients reduced one by one: none may be taken before it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "WHALEPY_OFF", what)
        patch.setattr(reduction, "BUCKET_BYTES", 1)
        yield


@contextmanager
def told(log: list[str]) -> Iterator[None]:
    """The log of what is under way and of what is done meanwhile."""
    done, pay, start, finish = Pending.done, Owed.pay, Move.start, Move.finish
    collectives = {name: getattr(Group, f"start_{name}") for name in ("all_reduce", "exchange")}

    def logged(name: str, call: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            log.append(name)
            return call(*args)

        return wrapped

    def waited(pending: Pending) -> Any:
        if pending.work is not None:
            log.append("wait")
        return done(pending)

    with pytest.MonkeyPatch.context() as patch:
        for name, call in collectives.items():
            patch.setattr(Group, f"start_{name}", logged(name, call))
        patch.setattr(Pending, "done", waited)
        patch.setattr(Owed, "pay", logged("weights", pay))
        patch.setattr(Move, "start", logged("start", start))
        patch.setattr(Move, "finish", logged("finish", finish))
        yield


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("off", ["", "asynchronous-bridges", "gradients-during-bridges"])
@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_local_run(workers: Pool, name: str, off: str, microbatches: int) -> None:
    make, scopes, world = CASES[name]
    options = {"microbatches": microbatches}
    compare(workers, Run(make, scopes, world, dtype=DTYPE, options=options, inject=lambda: without(off)))


@pytest.mark.parametrize("off", ["", "asynchronous-bridges"])
def test_a_number_that_crosses_between_stages_is_there(workers: Pool, off: str) -> None:
    options = {"microbatches": 1}
    compare(workers, Run(balanced, in_stages, 4, dtype=DTYPE, options=options, inject=lambda: without(off)))


def logs(name: str, off: str) -> list[str]:
    log: list[str] = []
    make, scopes, world = CASES[name]
    model, batches = make()
    with without(off), told(log):
        parallel = whalepy.compile(whalepy.annotate(model, scopes()), f"{world}xcpu", batches[0])
        own = parallel.local_batch(batches[0])
        log.clear()
        parallel.train_step(*own) if isinstance(own, tuple) else parallel.train_step(**own)
    return log


def test_weight_gradients_are_computed_while_a_bridge_is_under_way(workers: Pool) -> None:
    for log in workers.run(2, logs, "llama", ""):
        under_way = [pair for pair in pairwise(log) if pair == ("all_reduce", "weights")]
        assert len(under_way) == 5  # of the head, and of MLP and attention in two layers
        assert log.count("weights") == 11
    for log in workers.run(2, logs, "llama", "gradients-during-bridges"):
        assert "weights" not in log


@pytest.mark.parametrize("name", ["towers", "towers, nested"])
def test_bridges_are_under_way_between_their_halves(workers: Pool, name: str) -> None:
    world = CASES[name][2]
    for log in workers.run(world, logs, name, ""):
        start, finish = log.index("start"), log.index("finish")
        assert log[start + 1] in ("all_reduce", "exchange")
        assert log[start:finish].count("wait") >= 2  # for bridges of the other tower
        assert log[finish + 1] == "wait"
    for log in workers.run(world, logs, name, "asynchronous-bridges"):
        assert "start" not in log


@pytest.mark.parametrize("name", ["gpt2, rows", "gpt2, nested"])
def test_the_backward_pass_does_not_wait_for_the_loss(workers: Pool, name: str) -> None:
    for log in workers.run(CASES[name][2], logs, name, ""):
        assert log.count("start") == log.count("finish") + 1 == 2  # the loss; the count of targets
        assert log[0] == log[-1] == "wait" and log.index("start") < 4  # the agreement; behind the first product
    for log in workers.run(CASES[name][2], logs, name, "asynchronous-bridges"):
        assert "start" not in log


@contextmanager
def forgotten() -> Iterator[None]:
    """Nobody computes what waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queue, "_pay", lambda self: self.waiting.clear())
        yield


@contextmanager
def lost() -> Iterator[None]:
    """A started bridge gives zeros."""
    finish = Move.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Move, "finish", lambda self, started: finish(self, started) * 0)
        yield


@pytest.mark.parametrize(("name", "fault"), [("llama", forgotten), ("towers", lost)])
def test_faults_would_be_noticed(workers: Pool, name: str, fault: Any) -> None:
    make, scopes, world = CASES[name]
    assert differences(workers, Run(make, scopes, world, dtype=DTYPE, inject=fault))
