"""Rows and length change every step: no new capture, and every step is exact."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import whalepy
from benchmarks.models import MODELS
from tests.exactness import Run, differences
from tests.pool import Pool

VOCABULARY, LONGEST, MOST_ROWS = 96, 24, 9


def batch(draw: random.Random, sequences: int, rows: int, length: int) -> dict[str, Any]:
    """Rows padded at their end, where labels are -100; the first may have no label at all."""
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, draw.randint(2, length) :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if rows > 1 and draw.random() < 0.3:
        labels[0] = -100
    if sequences == 2:
        labels = labels[:, : draw.randint(3, length)].contiguous()
        labels[-1, 0] = 5
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def made(name: str, steps: int, seed: int) -> tuple[nn.Module, list[Any]]:
    draw = random.Random(f"{name} {seed}")
    sequences = 2 if name in ("t5", "bart") else 1
    sizes = [(8, 12)] + [(draw.randint(1, MOST_ROWS), draw.randint(3, LONGEST)) for _ in range(steps - 1)]
    return MODELS[name]()[0].train(), [batch(draw, sequences, rows, length) for rows, length in sizes]


def descent(model: nn.Module) -> torch.optim.Optimizer:
    """Over hundreds of steps AdamW doubles rounding every few steps: one process drifts from itself as far."""
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=[3, 1])}


@contextmanager
def captured_once() -> Generator[None]:
    """A second capture is an error."""
    from whalepy.runtime import build

    original, calls = build.capture, list[int]()

    def capture(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert len(calls) == 1, "the model is captured again"
        return original(*args, **kwargs)

    with mock.patch.object(build, "capture", capture):
        yield
    assert calls, "no capture was seen"


def check(workers: Pool, name: str, steps: int, seed: int = 0) -> None:
    run = Run(partial(made, name, steps, seed), uneven, 2, steps=steps, optimizer=descent, inject=captured_once)
    assert not differences(workers, run, timeout_s=500)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_lengths(workers: Pool, name: str) -> None:
    check(workers, name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama", "gpt_neox"])
def test_many_lengths(workers: Pool, name: str) -> None:
    check(workers, name, 200, seed=1)


def test_a_second_capture_fails() -> None:
    from whalepy.runtime import build

    with mock.patch.object(build, "capture", lambda: None), captured_once():
        build.capture()  # type: ignore[call-arg]
        with pytest.raises(AssertionError, match="captured again"):
            build.capture()  # type: ignore[call-arg]
