"""The example with a replicated backbone and a head split by classes, on the same devices."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool

SOURCE = Path(__file__).parent.parent / "examples" / "classification.py"
CLASSES = 23  # shared out unevenly


def template() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classification", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made() -> tuple[nn.Module, list[Any]]:
    module = template()
    torch.manual_seed(0)
    return module.Classifier(CLASSES), list(module.batches(2, CLASSES))


def uneven() -> dict[str, Any]:
    return {"backbone": whalepy.replicate(shares=[3, 1]), "head": whalepy.split(shares=[3, 1], on="head.weight:0")}


def defaults() -> dict[str, Any]:
    return {"backbone": whalepy.replicate(), "head": whalepy.split(on="head.weight:0")}


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, labels)


@pytest.mark.parametrize(("annotated", "world"), [(uneven, 2), (defaults, 4)])
def test_exact(workers: Pool, annotated: Any, world: int) -> None:
    run = Run(made, annotated, world, loss_fn=loss_of, steps=2, options={"sync_batchnorm": True})
    compare(workers, run)


def on_ranks(source: str, classes: int) -> tuple[list[float], tuple[int, ...], str, str]:
    namespace: dict[str, Any] = {"__name__": "classification"}
    exec(compile(source, "classification.py", "exec"), namespace)
    parallel = namespace["compiled"](classes)
    losses: list[float] = []
    namespace["train"](parallel, classes, 2, lambda step, loss: losses.append(loss))
    shape = tuple(dict(parallel.named_parameters())["head.weight"].shape)
    return losses, shape, str(parallel.program(0)), parallel.explain()


def test_the_template_trains(workers: Pool) -> None:
    """Every rank holds its classes, and no rank gathers the scores of all of them."""
    (losses, shape, program, why), (others, other, _, _) = workers.run(
        2, on_ranks, SOURCE.read_text(), CLASSES, default_group=False
    )
    module = template()
    torch.manual_seed(0)
    first = loss_of(
        module.Classifier(CLASSES)(next(module.batches(1, CLASSES))[0]), next(module.batches(1, CLASSES))[1]
    )
    assert losses == others
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)
    assert shape[0] + other[0] == CLASSES and min(shape[0], other[0]) > 0
    assert "is cut along head.weight:0" in why
    assert "class_parallel" in program
