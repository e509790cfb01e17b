"""Weight gradients that wait are those of the plain backward pass, on whole models and on shards of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool
from tests.programs import ResidualWithLoss, built_for
from whalepy.program.call import operator_name
from whalepy.rewrite.deferred import deferred, deferred_graph
from whalepy.rewrite.deferring import Deferred, Queue, deferring
from whalepy.runtime.captured import CapturedModel
from whalepy.runtime.reduction import Reduction
from whalepy.runtime.steps import StepProgram

aten = torch.ops.aten


def t5() -> models.Made:
    """One table of tokens for encoder, decoder and head."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"num_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": models.VOCABULARY}
    config = T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=True)
    return models._made(T5ForConditionalGeneration, config, None)


def resnet() -> models.Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=2)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(2, (4,))}
    return models._made(ResNetForImageClassification, config, [batch])


def residual() -> models.Made:
    torch.manual_seed(0)
    return ResidualWithLoss(), models.residual()[1]


def half_frozen() -> models.Made:
    """GPT-2 whose MLPs and token table do not learn."""
    model, batches = models.gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name and "wte" not in name)
    return model, batches


@dataclass
class Seen:
    """What happened in the steps of a model whose weight gradients wait."""

    notes: tuple[str, ...] = ()
    waiting: list[int] = field(default_factory=list[int])
    """Calls queued per microbatch."""
    missing: set[str] = field(default_factory=set[str])
    """Parameters without a gradient after the backward passes."""


@contextlib.contextmanager
def weights_wait() -> Iterator[Seen]:
    """Training steps run all their backward passes, then the weight gradients of each microbatch."""
    seen, queues = Seen(), list[Queue]()
    stage_run, finish, run = CapturedModel._stage_run, Reduction.finish, StepProgram.run

    def deferring_stage(self: Any, k: int, made: Any) -> Any:
        rewritten, seen.notes = deferred(made.rewritten, made.program)
        return stage_run(self, k, replace(made, rewritten=rewritten))

    def run_deferring(self: Any, *args: Any) -> Any:
        queue = Queue()
        if torch.is_grad_enabled():
            queues.append(queue)
        with deferring(queue):
            return run(self, *args)

    def finish_after(self: Any) -> None:
        seen.missing = {name for name, leaf in self.leaves.items() if leaf.requires_grad and leaf.grad is None}
        seen.waiting = [len(queue) for queue in queues]
        while queues:
            queues.pop(0).run()
        finish(self)

    with (
        mock.patch.object(CapturedModel, "_stage_run", deferring_stage),
        mock.patch.object(Reduction, "finish", finish_after),
        mock.patch.object(Reduction, "watch", lambda self: None),  # gradients come later than this backward pass
        mock.patch.object(StepProgram, "run", run_deferring),
    ):
        yield seen


def gradients(make: Callable[[], models.Made], microbatches: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Of two steps on one device, added up."""
    model, (batch, *_) = make()
    batch = pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, batch)
    parallel = whalepy.compile(model.to(dtype), "1xcpu", batch, microbatches=microbatches)
    for _ in range(2):
        args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), batch)
        parallel.train_step(*args, **kwargs)
    return {name: parameter.grad for name, parameter in parallel.named_parameters()}


def both(
    make: Callable[[], models.Made], microbatches: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None], Seen]:
    """Gradients of plain steps, those of steps whose weight gradients wait, and what these did."""
    plain = gradients(make, microbatches, dtype)
    with weights_wait() as seen:
        return plain, gradients(make, microbatches, dtype), seen


NO_FORM = "gives its weight gradient in the backward pass: it has no deferred form"
CASES: list[Any] = [
    # model, microbatches, calls that wait in each, notes
    pytest.param(models.llama, 2, 9, [f"aten.mul x3 {NO_FORM}"], id="llama"),
    pytest.param(models.gptj, 2, 8, [f"aten.layer_norm x2 {NO_FORM}"], id="gptj"),
    # batch norms take statistics of all rows: no microbatches
    pytest.param(resnet, 1, 12, [f"whalepy.batch_statistics x11 {NO_FORM}"], id="resnet"),
    pytest.param(residual, 2, 7, [f"aten.layer_norm {NO_FORM}"], id="residual"),
]
TIED: list[Any] = [
    pytest.param(models.gpt2, 2, 7, [f"aten.layer_norm x3 {NO_FORM}"], id="gpt2"),
    pytest.param(models.bert, 2, 11, [f"aten.layer_norm x4 {NO_FORM}"], id="bert"),
    pytest.param(t5, 2, 21, [f"aten.mul x7 {NO_FORM}"], id="t5"),
]


@pytest.mark.parametrize(("make", "microbatches", "waiting", "notes"), CASES)
def test_gradients_have_the_same_bits(
    make: Callable[[], models.Made], microbatches: int, waiting: int, notes: list[str]
) -> None:
    plain, late, seen = both(make, microbatches)
    assert {name for name, gradient in plain.items() if not same(gradient, late[name])} == set()
    assert (seen.waiting, list(seen.notes)) == ([waiting] * microbatches, notes)


@pytest.mark.parametrize(("make", "microbatches", "waiting", "notes"), TIED)
def test_gradients_of_tied_weights_add_up(
    make: Callable[[], models.Made], microbatches: int, waiting: int, notes: list[str]
) -> None:
    # in another order, so that the last bits differ
    plain, late, seen = both(make, microbatches, torch.float64)
    for name, gradient in plain.items():
        torch.testing.assert_close(late[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    assert (seen.waiting, list(seen.notes)) == ([waiting] * microbatches, notes)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b) and a.stride() == b.stride())


def test_until_the_queue_runs_only_the_rest_has_gradients() -> None:
    plain, _, seen = both(models.gptj)
    assert set(plain) - seen.missing == {name for name in plain if "ln_" in name}


def test_frozen_weights_queue_nothing() -> None:
    plain, late, seen = both(half_frozen)
    assert {name for name, gradient in late.items() if not same(gradient, plain[name])} == set()
    assert seen.waiting == [3, 3]  # two products of the attention and the table of positions


WIDE = 8


class Tied(nn.Module):
    """One weight in a product, which can wait, and in a sum, which cannot; two branches share one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE))
        self.left, self.right = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight) + self.weight.sum()
        return (x + self.left(x) + self.right(x)).square().mean()


class One(nn.Module):
    """The mean square of one operator with parameters of these shapes."""

    def __init__(self, op: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.op = op
        self.parameters_of_op = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.parameters_of_op).square().mean()


def test_a_weight_that_waits_in_one_place_and_not_in_another() -> None:
    def make() -> models.Made:
        torch.manual_seed(0)
        return Tied(), [(torch.randn(6, WIDE),)]

    plain, late, seen = both(make, dtype=torch.float64)
    for name, gradient in plain.items():
        torch.testing.assert_close(late[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    assert seen.notes == (f"aten.sum {NO_FORM}",) and seen.waiting == [3, 3]


X, M, V = (6, 5, WIDE), (WIDE, 12), (12,)
OPERATORS: list[Any] = [
    # operator, input, parameters
    pytest.param(lambda x, w, b: F.linear(x, w, b), X, [(12, WIDE), V], id="linear"),
    pytest.param(lambda x, w: F.linear(x.transpose(0, 1), w), X, [(12, WIDE)], id="strided input"),
    pytest.param(lambda x, w: F.linear(x, w.t()), X, [M], id="transposed weight"),
    pytest.param(lambda x, w, b: F.linear(x, w, bias=b), X, [(12, WIDE), V], id="bias by name"),
    pytest.param(lambda x, w: x @ w, X, [M], id="matmul"),
    pytest.param(lambda x, w: x @ w.permute(1, 2, 0).reshape(WIDE, 12), X, [(3, WIDE, 4)], id="copied view"),
    pytest.param(lambda x, w, b: torch.addmm(b, x, w), (6, WIDE), [M, V], id="addmm"),
    pytest.param(lambda x, w, b: torch.addmm(b, x, w), (6, WIDE), [M, (1, 12)], id="bias of one row"),
    pytest.param(lambda x, w: torch.bmm(x.transpose(0, 1), w), X, [(5, *M)], id="bmm"),
    pytest.param(lambda x, w, b: F.conv1d(x, w, b), (6, 4, 9), [(12, 4, 3), V], id="conv1d"),
    pytest.param(
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 0), dilation=(2, 1), groups=2),
        (6, 4, 9, 9), [(12, 2, 3, 3), V], id="conv2d",
    ),
    pytest.param(lambda x, w: F.conv2d(x, w, padding="same", dilation=3), (6, 4, 9, 9), [(12, 4, 3, 5)], id="same"),
    pytest.param(lambda x, w: F.conv2d(x, w, padding="valid"), (6, 4, 9, 9), [(12, 4, 3, 5)], id="valid"),
    pytest.param(lambda x, w: F.conv2d(x, w, groups=4), (6, 4, 9, 9), [(4, 1, 3, 3)], id="depthwise"),
    pytest.param(lambda x, w, b: F.conv3d(x, w, b), (6, 2, 5, 5, 5), [(3, 2, 3, 3, 3), (3,)], id="conv3d"),
    pytest.param(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (6, 4, 5, 5), [(4, 3, 3, 3), (6,)], id="conv_transpose2d",
    ),
    pytest.param(
        lambda x, w: aten.convolution.default(x, w, None, [2], [1], [1], False, [0], 1),
        (6, 4, 9), [(12, 4, 3)], id="convolution",
    ),
    pytest.param(lambda x, w: F.embedding(x.argmax(-1), w, padding_idx=2), X, [(WIDE, 3)], id="embedding"),
    pytest.param(lambda x, w: F.embedding(x.argmax(-1), w, None, None, 2.0, True), X, [(WIDE, 3)], id="by frequency"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "shapes"), OPERATORS)
@pytest.mark.parametrize("learned_input", [False, True])
def test_operators(op: Callable[..., Tensor], shape: Any, shapes: list[Any], learned_input: bool) -> None:
    """Every parameter of the operator waits; the input may have a gradient, that of a scale."""

    def make() -> models.Made:
        torch.manual_seed(0)
        own = (lambda x, s, *p: op(x * s, *p)) if learned_input else op
        return One(own, *([(shape[-1],)] if learned_input else []), *shapes), [(torch.randn(shape),)]

    plain, late, seen = both(make, 1)
    assert {name for name, gradient in plain.items() if not same(gradient, late[name])} == set()
    expected = {f"parameters_of_op.{k + learned_input}" for k in range(len(shapes))}
    assert seen.missing - {"parameters_of_op.0"} == expected - {"parameters_of_op.0"} and seen.waiting == [1]


KEPT: list[Any] = [
    (lambda x, w, b: torch.addmm(b, x, w, beta=2), (6, WIDE), [M, V], "aten.addmm", "its product is scaled by beta"),
    (lambda x, w: F.linear(x, w.tanh()), X, [(12, WIDE)], "aten.linear", "its weight is made by aten.tanh"),
    (lambda x, w: torch.mm(w, x.t()), (6, WIDE), [(12, WIDE)], "aten.mm", "its weight is the first factor"),
    (lambda x, b: F.linear(x, x.t() @ x, b), (6, WIDE), [(WIDE,)], "aten.linear", "its weight depends on the batch"),
    (lambda x, w: x @ w, X, [(WIDE,)], "aten.matmul", "its weight is no matrix"),
    (
        lambda x, w: F.conv1d(x, w, padding="same"),
        (6, 4, 9), [(12, 4, 2)], "aten.conv1d", "it pads one side more than the other",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "shapes", "operator", "reason"), KEPT)
def test_what_cannot_wait_says_why(
    op: Callable[..., Tensor], shape: Any, shapes: list[Any], operator: str, reason: str
) -> None:
    made = built_for(One(op, *shapes), (torch.randn(shape),), speeds=(1.0,))
    after, notes = deferred(made.rewritten, made.program)
    assert f"{operator} gives its weight gradient in the backward pass: {reason}" in notes
    assert not any(isinstance(node.target, Deferred) for node in after.graph.graph.nodes)


def test_a_bias_that_is_computed_does_not_wait() -> None:
    def make() -> models.Made:
        torch.manual_seed(0)
        return One(lambda x, w, b: F.linear(x, w, b.tanh()), (12, WIDE), V), [(torch.randn(X),)]

    plain, late, seen = both(make, 1)
    assert all(same(gradient, late[name]) for name, gradient in plain.items())
    assert seen.missing == {"parameters_of_op.0"}


def test_arguments_given_by_name() -> None:
    graph = fx.Graph()
    x, w, b = map(graph.placeholder, "xwb")
    w.meta["val"], x.meta["val"] = torch.randn(M).t(), torch.randn(X)
    y = graph.call_function(aten.linear.default, (x, w), {"bias": b})
    graph.output(y)
    module = fx.GraphModule({}, graph)
    after, _ = deferred_graph(module, trained={"w", "b"}, inputs={"x"}, learning={"w", "b", y.name})
    values = torch.randn(X), torch.randn(12, WIDE), torch.randn(V)
    assert torch.equal(after(*values), module(*values))


def deferred_call(op: Any, x: Tensor, weight: Tensor, *, learns: bool = True) -> tuple[Any, tuple[str, ...]]:
    """What stands for one operator with a trained weight, and the notes."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "xw"]
    for node, value in zip(nodes, (x, weight), strict=True):
        node.meta["val"] = value
    y = graph.call_function(op, tuple(nodes))
    graph.output(y)
    learning = {"w", *([y.name] if learns else [])}
    after, notes = deferred_graph(fx.GraphModule({}, graph), trained={"w"}, inputs={"x"}, learning=learning)
    return next(n.target for n in after.graph.nodes if n.op == "call_function"), notes


def test_what_the_backward_pass_does_not_reach_stays() -> None:
    op, x, weight = aten.linear.default, torch.randn(X), torch.randn(12, WIDE)
    assert isinstance(deferred_call(op, x, weight)[0], Deferred)
    assert deferred_call(op, x, weight, learns=False) == (op, ())


def test_a_convolution_without_a_batch_does_not_wait() -> None:
    op = aten.conv1d.default
    note = "aten.conv1d gives its weight gradient in the backward pass: its input has no batch"
    assert deferred_call(op, torch.randn(4, 9), torch.randn(12, 4, 3)) == (op, (note,))


def test_a_product_without_a_weight_has_no_note() -> None:
    def op(x: Tensor, s: Tensor) -> Tensor:
        return (x * s) @ torch.arange(WIDE * 2.0).reshape(WIDE, 2)

    made = built_for(One(op, (WIDE,)), (torch.randn(X),), speeds=(1.0,))
    assert deferred(made.rewritten, made.program)[1] == (f"aten.mul {NO_FORM}",)


def test_the_graph_is_the_same_but_for_the_kernels() -> None:
    made = built_for(*first(models.gpt2()), speeds=(1.0,))
    before = [(n.name, n.op, str(n.args), n.meta.get("where")) for n in made.rewritten.graph.graph.nodes]
    targets = [n.target for n in made.rewritten.graph.graph.nodes]
    after, _ = deferred(made.rewritten, made.program)
    assert [(n.name, n.op, str(n.args), n.meta.get("where")) for n in after.graph.graph.nodes] == before
    assert [n.target for n in made.rewritten.graph.graph.nodes] == targets
    calls = [n.target for n in after.graph.graph.nodes if isinstance(n.target, Deferred)]
    assert {operator_name(call.op) for call in calls} == {"aten.linear", "aten.addmm", "aten.embedding"}
    after.graph.graph.lint()


def first(made: models.Made) -> tuple[nn.Module, Any]:
    model, (batch, *_) = made
    return model, batch


def by(degree: Callable[..., Any], *shares: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"": degree(len(shares), shares=list(shares))}


DISTRIBUTED: list[Any] = [
    pytest.param(models.gpt2, by(whalepy.split, 3, 1), 1, id="gpt2 by heads and vocabulary"),
    pytest.param(models.gpt2, by(whalepy.replicate, 3, 1), 2, id="gpt2 by rows"),
    pytest.param(models.gpt2, by(whalepy.replicate, 1, 0), 1, id="a rank without rows"),
    pytest.param(residual, by(whalepy.split, 3, 1), 1, id="channels"),
    pytest.param(residual, by(whalepy.split, 1, 0), 1, id="a rank without channels"),
]


@pytest.mark.parametrize(("make", "scopes", "microbatches"), DISTRIBUTED)
def test_shards(workers: Pool, make: Any, scopes: Callable[[], dict[str, Any]], microbatches: int) -> None:
    options = {"microbatches": microbatches}
    compare(workers, Run(make, scopes, 2, options=options, inject=weights_wait, evaluate=True))
