"""A backend of torch.compile for what lies between bridges: the same training, the same draws, the same order."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.errors import PlanError
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import MoveBinding, Stream
from whalepy.rewrite.rewrite import Rewritten
from whalepy.runtime.pieces import in_pieces

BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


def rows() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def heads() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(3, 1))}


def nested() -> dict[str, Any]:
    return {"": whalepy.replicate(2), "transformer.h.*": whalepy.split(2, shares=(3, 1))}


def stages() -> dict[str, Any]:
    return {"transformer.h.0": whalepy.stage(1), "lm_head": [whalepy.stage(2), whalepy.split(2, shares=(3, 1))]}


def changing() -> models.Made:
    """Eight rows, two, then one: a rank has none."""
    return models.gpt2(models.language_batches([(8, 12), (2, 12), (1, 9)]))


CASES = {
    "rows": (models.gpt2, rows, 2, {}),
    "heads": (models.gpt2, heads, 2, {}),
    "rows and heads": (models.gpt2, nested, 4, {}),
    "sizes that change": (changing, rows, 2, {}),
    "microbatches that do not divide": (models.gpt2, heads, 2, {"microbatches": 3}),
    "stages": (models.gpt2, stages, 3, {"microbatches": 4}),
    "zero-bubble": (models.gpt2, stages, 3, {"microbatches": 4, "schedule": "zero-bubble"}),
    "convolutions": (models.residual, rows, 2, {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "annotations", "world", "options"), CASES.values(), ids=CASES)
def test_training_equals_local(
    workers: Pool, make: Any, annotations: Any, world: int, options: dict[str, Any], backend: str
) -> None:
    dtype = torch.float64 if backend == "aot_eager" else torch.float32
    loss_fn = models.classes_loss if make is models.residual else None
    more: Any = {"evaluate": True, "loss_fn": loss_fn, "options": {"backend": backend, **options}}
    run = Run(make, annotations, world, dtype=dtype, **more)
    compare(workers, run, timeout_s=600)


class Dropped(nn.Module):
    """Draws between two products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.down(self.up(x).relu()).tanh(), 0.5).square().mean()


def draws(backend: str) -> list[float]:
    """The losses of three steps."""
    model = whalepy.annotate(Dropped(), {"": whalepy.replicate()})
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    parallel = whalepy.compile(model, "2xcpu", (x,), backend=backend)
    return [float(parallel.train_step(*parallel.local_batch((x,)))) for _ in range(3)]


def test_draws_are_those_without_a_backend(workers: Pool) -> None:
    eager, compiled = workers.run(2, draws, "eager"), workers.run(2, draws, "aot_eager")
    assert eager == compiled
    assert len(set(eager[0])) == 3


def test_pieces_end_at_bridges() -> None:
    """One bridge in the middle, one call that draws: three pieces, and both stay alone."""
    graph = fx.Graph()
    x, weight, move, seed = (graph.placeholder(name) for name in ("x", "weight", "move", "seed"))
    shared = graph.call_function(torch.ops.aten.relu.default, (x,))
    first = graph.call_function(torch.ops.aten.mm.default, (shared, weight))
    moved = graph.call_function(kernels.bridge, (first, move))
    tanh = graph.call_function(torch.ops.aten.tanh.default, (moved,))
    added = graph.call_function(torch.ops.aten.add.Tensor, (tanh, shared))
    drawn = graph.call_function(kernels.Seeded(torch.ops.aten.dropout.default), (seed, added, 0.5, True))
    last = graph.call_function(torch.ops.aten.mul.Tensor, (drawn, 2.0))
    graph.output((graph.call_function(torch.ops.aten.sum.default, (last,)),))
    module = fx.GraphModule({}, graph)
    move_binding = MoveBinding(0, "P", "R", ())
    rewritten = Rewritten(module, (move_binding, Stream(0, ())), 1, (), {})
    cut = in_pieces(rewritten, "aot_eager")
    calls = [node.target for node in cut.graph.nodes if "call" in node.op and node.target is not operator.getitem]
    names = [getattr(target, "__name__", target) for target in calls]
    assert names == [
        "piece_0",
        "bridge",
        "piece_1",
        "seeded_dropout_default",
        "piece_2",
    ]
    values = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4), lambda value: value + 1, 7
    (expected,), (found,) = module(*values), cut(*values)
    assert torch.allclose(found, expected)
    wanted, got = (torch.autograd.grad(loss, values[0])[0] for loss in (expected, found))
    assert torch.allclose(got, wanted)


def test_unknown_backend() -> None:
    with pytest.raises(PlanError, match=r"unknown backend 'induktor'\n  fix: did you mean inductor"):
        whalepy.compile(Dropped(), "1xcpu", (torch.randn(8, 8),), backend="induktor")
