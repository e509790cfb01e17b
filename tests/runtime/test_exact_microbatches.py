"""Microbatches give the loss and the gradients of the whole batch: denominators are counted over it in a prologue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import whalepy
from tests import models, pipelines
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.errors import PlanError

TWO, THREE = {"microbatches": 2}, {"microbatches": 3}


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def three() -> dict[str, Any]:
    return {"": whalepy.replicate(3, shares=(5, 2, 1))}


def split_blocks() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(3, 1))}


def nested() -> dict[str, Any]:
    return {"": [whalepy.replicate(2), whalepy.split(2, shares=(3, 1))]}


def head() -> dict[str, Any]:
    return {"transformer": whalepy.replicate(2), "lm_head": whalepy.split(2, shares=(3, 1))}


def ignored(make: Callable[[list[Any]], models.Made] = models.gpt2, rows: int = 6) -> Callable[[], models.Made]:
    """Labels are -100 unevenly over ranks and over microbatches."""
    return lambda: make(models.language_batches([(8, 12)], ignored=rows))


def changing_rows() -> models.Made:
    """Ranks that get fewer rows than there are microbatches, or none."""
    return models.gpt2(models.language_batches([(8, 12), (5, 9), (1, 12)]))


def experts() -> models.Made:
    """In the last step some ranks have no word at all."""
    return models.mixtral(models.language_batches([(7, 12), (2, 3)]))


def nested_layers() -> dict[str, Any]:
    """Three quarters of the rows, and of every expert."""
    return {"": whalepy.replicate(2, shares=(3, 1)), "model.layers.*": whalepy.split(2, shares=(3, 1))}


def uncached() -> models.Made:
    """GPT-2 then looks where one text ends and the next begins."""
    model, batches = models.gpt2()
    model.config.use_cache = False
    return model, batches


def own() -> models.Made:
    return models.residual((8, 8, 3))


RUNS: dict[str, Run] = {
    "replicate": Run(ignored(), uneven, 2, options=THREE),
    "split of blocks": Run(ignored(), split_blocks, 2, options=THREE),
    "head split by classes": Run(ignored(), head, 2, options=THREE),
    "rows that change": Run(changing_rows, three, 3, options=THREE),
    "gpt2 without a cache": Run(uncached, uneven, 2, options=THREE),
    "mixtral": Run(experts, nested_layers, 4, dtype=torch.float32, options=THREE),
    "t5 in two": Run(pipelines.t5, uneven, 2, options=TWO),
    "t5 in three": Run(pipelines.t5, uneven, 2, options=THREE),
    "t5 on one device": Run(pipelines.t5, dict[str, Any], 1, options=THREE),
    "mbart": Run(pipelines.mbart, uneven, 2, options=THREE),
    "own model": Run(own, uneven, 2, loss_fn=models.classes_loss, evaluate=True, options=THREE),
}
MORE: dict[str, Run] = {
    "bert, replicate": Run(ignored(models.bert), three, 3, dtype=torch.float32, options=THREE),
    "replicate > split": Run(ignored(), nested, 4, spec="2xcpu + 2xcpu*0.5", options=THREE),
    "accumulation": Run(ignored(rows=2), uneven, 2, accumulate=2, options=THREE),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_microbatches(workers: Pool, run: Run) -> None:
    compare(workers, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", MORE.values(), ids=MORE)
def test_more_microbatches(workers: Pool, run: Run) -> None:
    compare(workers, run)


class Averaged(torch.nn.Module):
    """A mean over rows is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 2)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.down(torch.tanh(self.up(x))), target)


def averaged() -> models.Made:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    return Averaged(), [(torch.randn(n, 6, generator=draw), torch.randn(n, 2, generator=draw)) for n in (6, 7)]


@pytest.mark.parametrize("scopes", [{"": whalepy.split(2)}, {"up": whalepy.split(2, shares=(3, 1))}, {}], ids=str)
def test_a_mean_counts_the_rows_of_the_step_where_no_level_cuts_rows(workers: Pool, scopes: Any) -> None:
    compare(workers, Run(averaged, lambda: scopes, 2 if scopes else 1, options=THREE))


class Bounded(torch.autograd.Function):
    """A root whose slope is bounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / torch.sqrt(torch.clamp(4.0 * ctx.saved_tensors[0], min=1e-2))


class Tokens(torch.nn.Module):
    """A learned token beside the words of each row, which attend to it; the loss starts at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.table = torch.nn.Parameter(torch.randn(1, 1, 6)), torch.nn.Embedding(9, 6)
        self.mix, self.down = torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        query = self.mix(self.token.expand(len(x), 2, -1))
        seen = torch.nn.functional.scaled_dot_product_attention(query, x, x)
        first = torch.cat([self.token.repeat(len(x), 1, 1), seen, x], dim=1).mean(1)
        first = first + Bounded.apply(first.square() + 0.001)
        return 1.5 - torch.nn.functional.cross_entropy(self.down(first), target).neg() + 0


class Places(Tokens):
    """A learned vector for each row, by its number."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table(torch.arange(len(x)))[:, None], target)


class Heads(Tokens):
    """The same, the first rows of a table."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table.weight[: len(x), None], target)


def with_tokens(model: type[torch.nn.Module] = Tokens) -> models.Made:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    return model(), [(torch.randn(n, 3, 6, generator=draw), torch.arange(n) % 4) for n in (8, 7)]


@pytest.mark.parametrize("scopes", [{"": whalepy.replicate(2, shares=(3, 1))}, {"mix": whalepy.split(2)}], ids=str)
def test_copies_of_a_parameter_for_each_row_are_cut(workers: Pool, scopes: Any) -> None:
    compare(workers, Run(with_tokens, lambda: scopes, 2, options=THREE))


@pytest.mark.parametrize("model", [Places, Heads])
def test_rows_of_a_parameter_are_not_cut(model: type[torch.nn.Module]) -> None:
    own, (batch, _) = with_tokens(model)
    with pytest.raises(PlanError, match="the loss is not a sum over rows"):
        whalepy.plan(whalepy.annotate(own, uneven()), "2xcpu", batch, **THREE)


def running_mean(count: int) -> torch.Tensor:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=1.0), torch.nn.Linear(3, 4))
    rows = torch.arange(18.0).view(6, 3)
    scopes = {"1": whalepy.split(2)}
    parallel = whalepy.compile(
        whalepy.annotate(model, scopes), "2xcpu", (rows, rows[:, :1].long() % 4), loss_fn=row_loss, microbatches=count
    )
    parallel.train_step(*parallel.local_batch((rows, rows[:, :1].long() % 4)))
    return parallel.full_state_dict()["0.running_mean"]


def row_loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, target.squeeze(1))


def test_statistics_of_microbatches_are_averaged_where_no_level_cuts_rows(workers: Pool) -> None:
    one, three = (workers.run(2, running_mean, count)[0] for count in (1, 3))
    assert torch.allclose(one, three)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Weighed(torch.nn.Module):
    """A loss of logits, of a weight per row, and of targets; it may keep the sum of the weights, and the largest."""

    def __init__(self, loss: Loss, *, counts: bool) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 4)
        self.loss, self.counts = loss, counts
        self.register_buffer("seen", torch.zeros(()))
        self.seen: torch.Tensor

    def forward(self, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.training and self.counts:
            self.seen += weight.max() + weight.sum()
        return self.loss(self.down(torch.tanh(self.up(x))), weight, target)


def weighed(loss: Loss, *, counts: bool = False) -> models.Made:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    return Weighed(loss, counts=counts), [
        (torch.randn(n, 6, generator=draw), torch.rand(n, generator=draw) + 0.1, torch.arange(n) % 4) for n in (8, 7)
    ]


def each(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of each row."""
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


# What is known of all rows before the first microbatch: numbers, or a value for each row.
KNOWN_AHEAD: dict[str, Loss] = {
    "a weighted mean": lambda y, w, t: (each(y, t) * w).sum() / w.sum(),
    "shares of a sum": lambda y, w, t: (each(y, t) * (w / w.sum())).sum(),
    "shares, contracted": lambda y, w, t: (w / w.sum()) @ each(y, t),
    "of rows that are counted": lambda y, w, t: (each(y, t) * (w / w.sum() * torch.arange(len(w)))).sum(),
    "rows of other rows": lambda y, w, t: (each(y, t) * w.roll(1)).sum(),
    "labels of other rows": lambda y, w, t: each(y, t.flip(0)).sum(),
    "of pairs of rows": lambda y, w, t: (each(y, t) * (w[:, None] - w).abs().mean(1)).sum(),
    "a term without rows": lambda y, w, t: (each(y, t) * w).sum() + w.max(),
    "a term that is a sum": lambda y, w, t: (each(y, t) * w).sum() + (w.max() + w.sum()),
    "a sum as a divisor and as a term": lambda y, w, t: each(y, t).sum() / w.sum() + w.sum(),
    "rows of what is known, by an operator without a rule": lambda y, w, t: (
        each(y, t) * torch.renorm(torch.arange(3.0).expand(len(w), 3), 2, 0, 1.0).to(y).sum(1)
    ).sum(),
    "of the model's own values": lambda y, w, t: (each(y, t) * y.detach().sum(1).softmax(0)).sum(),
}


@pytest.mark.parametrize("loss", KNOWN_AHEAD.values(), ids=KNOWN_AHEAD)
def test_what_is_known_of_all_rows_is_computed_ahead(workers: Pool, loss: Loss) -> None:
    compare(workers, Run(lambda: weighed(loss, counts=True), uneven, 2, steps=2, options=THREE))


@pytest.mark.parametrize("name", ["a weighted mean", "shares of a sum"])
def test_rows_inside_a_stage_are_computed_ahead(workers: Pool, name: str) -> None:
    compare(workers, Run(lambda: weighed(KNOWN_AHEAD[name]), rows_inside, 3, steps=2, options=THREE))


def rows_inside() -> dict[str, Any]:
    """What reads the rows of the batch is on two devices that hold them by microbatches."""
    return {"up": whalepy.stage(1), "down": [whalepy.stage(2), whalepy.replicate(2, shares=(3, 1))]}


ORDER = (
    "an operator needs the rows of the whole batch in their order, but ranks inside a stage hold them by microbatches\n"
    "  fix: leave out microbatches=, or put the replicate scope around the stages"
)


@pytest.mark.parametrize("name", ["of rows that are counted", "rows of other rows"])
def test_rows_in_their_order_are_refused_inside_a_stage(workers: Pool, name: str) -> None:
    def refused() -> str:
        model, batches = weighed(KNOWN_AHEAD[name])
        try:
            whalepy.compile(whalepy.annotate(model, rows_inside()), "3xcpu", batches[0], **THREE)
        except PlanError as error:
            return str(error)
        return "compiled"

    assert workers.run(3, refused) == [ORDER] * 3


# loss -> the operator that is no sum over rows, or draws
REFUSED: dict[str, tuple[Loss, str]] = {
    "a root": (lambda y, w, t: ((y**2).sum(1) * w / w.sum()).sum().sqrt(), "aten.sqrt needs all rows at once"),
    "a divisor that learns": (lambda y, w, t: (each(y, t) * (y / y.sum()).sum(1)).sum(), "aten.div needs all rows"),
    "rows inside other dims": (
        lambda y, w, t: (y.reshape(-1) * (w / w.sum())[:, None].expand(-1, 4).reshape(-1)).sum(),
        "aten.mul needs all rows at once",
    ),
    "numbers drawn twice": (
        lambda y, w, t: (noise := torch.rand_like(w)) @ each(y, t) / noise.sum(),
        "aten.rand_like draws numbers for each microbatch",
    ),
}


@pytest.mark.parametrize(("loss", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_loss_that_is_no_sum_over_rows_is_refused(loss: Loss, expected: str) -> None:
    model, batches = weighed(loss)
    with pytest.raises(PlanError, match=expected):
        whalepy.plan(whalepy.annotate(model, uneven()), "2xcpu", batches[0], **THREE)
