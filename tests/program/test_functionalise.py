"""Programs with writes and views, against eager: results, gradients, buffers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from whalepy.errors import CaptureError
from whalepy.program.capture import Captured, capture
from whalepy.program.capture_schema import pure_form, writes

torch.set_num_threads(1)
aten = torch.ops.aten


class Program(nn.Module):
    """loss = sum(weights * body(self, x * w + b)), with a buffer that the body may write to."""

    def __init__(self, body: Callable[[Any, Tensor], Any], columns: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(columns))
        self.b = nn.Parameter(torch.randn(columns))
        self.register_buffer("buffer", torch.randn(3, columns))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        results = self.body(self, x * self.w + self.b)
        return sum((_weighted(r) for r in pytree.tree_leaves(results)), torch.zeros(()))


def _weighted(result: Tensor) -> Tensor:
    """A sum in which every element counts differently, so that one in the wrong place is seen."""
    weights = torch.sin(torch.arange(result.numel()) + 1.0).reshape(result.shape)
    return (result.to(torch.float32) * weights).sum()


def run(captured: Captured, *args: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The results and the new values of buffers."""
    values = [args[p.leaf] if p.leaf is not None else p.value for p in captured.placeholders]
    outputs = fx.Interpreter(captured.graph).run(*values)
    return outputs[: captured.results], dict(zip(captured.mutations, outputs[captured.results :], strict=True))


def check_against_eager(model: nn.Module, captured: Captured, *args: Tensor, tolerance: float = 1e-6) -> None:
    """Loss, gradients and buffers of the graph and of a copy of the model that runs eagerly."""
    eager = copy.deepcopy(model)
    model.zero_grad()
    expected = eager(*(arg.clone() for arg in args))
    expected.backward()
    (loss,), mutations = run(captured, *args)
    if loss.requires_grad:
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for (name, parameter), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=tolerance, atol=tolerance, msg=name)
    before = dict(model.named_buffers())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(mutations.get(name, before[name]), buffer, rtol=tolerance, atol=tolerance, msg=name)


def check(body: Callable[[Any, Tensor], Any]) -> Captured:
    """Captures the program at 4 rows and compares it at 4 and at 5."""
    model = Program(body)
    captured = capture(model, (torch.randn(4, 6),))
    assert not any(writes(node) for node in captured.graph.graph.nodes)
    for rows in (4, 5):
        check_against_eager(model, captured, torch.randn(rows, 6))
    return captured


# In place


def chain(m: Any, h: Tensor) -> Tensor:
    return h.add_(1).mul_(2).sub_(h * 0.5).clamp_(max=3)


def half_into_float(m: Any, h: Tensor) -> Tensor:
    y = h.to(torch.float64)
    z = h.clone()
    return z.add_(y)  # the result of add is float64, that of add_ is not


def comparison(m: Any, h: Tensor) -> Tensor:
    z = h.clone()
    z.gt_(0)
    return z + h


def mask(m: Any, h: Tensor) -> Tensor:
    h.masked_fill_(h > 0.5, 0.25)
    h[h < 0] = 2.0
    return h


def index_put(m: Any, h: Tensor) -> Tensor:
    h[torch.tensor([0, 2])] = h[torch.tensor([1, 3])] * 3
    return h


def index_add(m: Any, h: Tensor) -> Tensor:
    return h.index_add_(0, torch.tensor([0, 1, 0]), m.w.expand(3, 6) * 2)


def scatter_add(m: Any, h: Tensor) -> Tensor:
    z = torch.zeros(h.shape[0], 3)
    return z.scatter_add_(1, torch.tensor([0, 1, 2, 0, 1, 2]).expand(h.shape[0], 6), h)


def fill_and_zero(m: Any, h: Tensor) -> Tensor:
    h[0].fill_(3.0)
    h[1].zero_()
    h[:, 2].fill_(m.w[0])
    return h


def integer_ior(m: Any, h: Tensor) -> Tensor:
    flags = h > 0
    flags |= h < -1
    flags &= h < 1
    return torch.where(flags, h, h * 2)


def out_argument(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.empty_like(h)
        torch.add(h, 1, out=y)
    return y * h


def transpose_in_place(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    y = h * 2
    row = y[0]
    y.t_().mul_(torch.arange(6.0)[:, None])
    y.unsqueeze_(0).add_(1)
    return y, row


def copy_broadcast(m: Any, h: Tensor) -> Tensor:
    h[1:].copy_(m.w)
    h[0].copy_(h[1].double())
    return h


def detached_write(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    y = h.detach()
    y.mul_(3)  # changes the values of h and not its gradient
    return h * h, y


def no_grad_write(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    first = h[0]
    with torch.no_grad():
        h.clamp_(max=0.2)
        h[1] = 5.0
    return h * 2, first * 3


def no_grad_inner(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs().mean()
        scale.mul_(2)
    return h * scale


def dead_dropout(m: Any, h: Tensor) -> Tensor:
    y = F.dropout(h, 0.0, training=True)
    y = F.dropout(y, 0.5, training=False, inplace=True)
    y.add_(1)
    return y + h  # both are the tensor h itself


# Writes through views


def select_write(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    column = h[:, 1]
    column.mul_(m.w[0])
    h.add_(1)
    return h, column


def slice_write(m: Any, h: Tensor) -> Tensor:
    h[1:, ::2] += m.w[::2]
    h[:, -1:] = 0
    h[..., 1:3] *= 2
    return h


def transpose_write(m: Any, h: Tensor) -> Tensor:
    t = h.transpose(0, 1)
    t[0] = 1.5
    t.permute(1, 0)[0].add_(2)
    h.T[2].mul_(3)
    return t * h.transpose(0, 1)


def diagonal_write(m: Any, h: Tensor) -> Tensor:
    h.diagonal(offset=1).mul_(4)
    return h


def chunk_write(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():  # eager forbids the write elsewhere
        h.chunk(2, dim=1)[1].mul_(2)
        h.split([1, 2, 3], dim=1)[2].add_(1)
        h.unbind(1)[0].fill_(7)
        h.split(4, dim=1)[0].mul_(2)
    return h * h


def reshape_write(m: Any, h: Tensor) -> Tensor:
    v = h.view(-1, 2, 3)
    v[:, 1] = v[:, 0] * 2
    h.reshape(-1)[:3].add_(1)
    h.flatten(0, 1)[-1].zero_()
    h.unsqueeze(1).squeeze(1).squeeze()[0].mul_(2)
    h.unflatten(1, (3, 2))[:, 0].mul_(1.5)
    return v


def reshape_copy(m: Any, h: Tensor) -> Tensor:
    flat = h.t().reshape(-1)  # a copy: the write does not reach h
    flat.zero_()
    same = h.contiguous()  # no copy: the write does
    same.mul_(2)
    return h + flat.sum()


def rare_views(m: Any, h: Tensor) -> Tensor:
    h.unfold(1, 2, 2)[:, 1].add_(3)
    h.movedim(0, 1)[1].mul_(2)
    h.as_strided((2, 2), (1, 2)).mul_(0.5)
    return h


def view_of_written_view(m: Any, h: Tensor) -> tuple[Tensor, ...]:
    a = h[1:]
    b = a[:, 2:]
    c = b.t()
    c.mul_(2)
    a[0].add_(1)
    b += c.t() * 0.5
    h.view(-1)[0] = 9
    return h, a, b, c


def gradient_into_detached(m: Any, h: Tensor) -> tuple[Tensor, ...]:
    row = m.buffer[0]
    silent = row.detach()
    silent.copy_(h.mean(0))  # a gradient flows into `silent`, and none into `row`
    return row * 2, silent, h


def detached_with_a_gradient_of_its_own(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    d = h.detach()
    d.add_(m.w)  # from here on a gradient flows into d
    with torch.no_grad():
        h.fill_(0.5)  # d reads 0.5 and keeps its gradient
    return h, d * 3


def turned_alias(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    same = h[:]  # another tensor, whose turning h does not see
    same.transpose_(0, 1)
    h.mul_(2)
    return h, same


def expanded_read(m: Any, h: Tensor) -> Tensor:
    e = h[:1].expand(3, 6)
    h[0].add_(2)
    return e


def list_of_views(m: Any, h: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(h, h[:1] * 2)
    h.mul_(3)
    return a * b


def complex_views(m: Any, h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.reshape(-1, 3, 2))
    z.mul_(2j)
    return torch.view_as_real(z) + h.reshape(-1, 3, 2)


# Buffers


def buffer_writes(m: Any, h: Tensor) -> Tensor:
    m.buffer.mul_(0.9)
    m.buffer[0].add_(h.detach().mean(0))
    return h * m.buffer[0]


def buffer_no_grad(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.buffer.mul_(0.9).add_(0.1 * h.mean(0))
        m.buffer[1].copy_(m.w)
    return h * m.buffer[1]


def buffer_data(m: Any, h: Tensor) -> Tensor:
    m.buffer.data.mul_(0.5)
    h.data[0].zero_()  # as a write to h.detach()
    return h * m.buffer[2]


def buffer_assigned(m: Any, h: Tensor) -> Tensor:
    m.buffer.add_(1)
    m.buffer = m.buffer * 0.5
    m.buffer[2].zero_()
    return h + m.buffer[2]


CASES = [
    chain,
    half_into_float,
    comparison,
    mask,
    index_put,
    index_add,
    scatter_add,
    fill_and_zero,
    integer_ior,
    out_argument,
    transpose_in_place,
    copy_broadcast,
    detached_write,
    no_grad_write,
    no_grad_inner,
    dead_dropout,
    select_write,
    slice_write,
    transpose_write,
    diagonal_write,
    chunk_write,
    reshape_write,
    reshape_copy,
    rare_views,
    view_of_written_view,
    gradient_into_detached,
    detached_with_a_gradient_of_its_own,
    turned_alias,
    expanded_read,
    list_of_views,
    complex_views,
    buffer_writes,
    buffer_no_grad,
    buffer_data,
    buffer_assigned,
]


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_program_equals_eager(body: Callable[[Any, Tensor], Any]) -> None:
    check(body)


# What is overwritten as a whole: which gradients are zeros, and which are none


def copied(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v.copy_(m.buffer[:1])
    return v


def copied_from_a_parameter(m: Any, h: Tensor) -> Tensor:
    v = (h * m.b).clone()
    v.copy_(m.w)
    return v


def copied_to_what_has_none(m: Any, h: Tensor) -> Tensor:
    v = h.detach() * 2
    v.copy_(m.w)
    return v


def copied_to_an_empty_one(m: Any, h: Tensor) -> Tensor:
    v = torch.empty_like(h)
    v.copy_(m.w)
    return v


def copied_from_another_type(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v.copy_(m.buffer[0].double())
    return v


def ellipsis_written(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v[...] = m.buffer[0]
    return v


def colon_written(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v[:] = m.buffer[0]
    return v


def view_written(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v.t()[:] = m.buffer[0][:, None]
    return v


def rows_and_columns_written(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v[:, :] = 1.5
    return v


def filled(m: Any, h: Tensor) -> Tensor:
    return h.clone().fill_(2.0)


def filled_by_a_tensor(m: Any, h: Tensor) -> Tensor:
    return (h * m.b).clone().fill_(m.w[0])


def zeroed(m: Any, h: Tensor) -> Tensor:
    return h.clone().zero_()


def masked_wholly(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v[h < float("inf")] = 1.0
    return v


def masked_filled(m: Any, h: Tensor) -> Tensor:
    return h.clone().masked_fill_(h < float("inf"), 1.0)


def compared(m: Any, h: Tensor) -> Tensor:
    return h.clone().gt_(0)


def copied_where_autograd_does_not_see(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    with torch.no_grad():
        v.copy_(m.buffer[0])
    return v


def copied_twice(m: Any, h: Tensor) -> Tensor:
    v = h.clone()
    v.copy_(m.buffer[0])
    v.copy_(m.buffer[1])
    return v


def infinite(m: Any, h: Tensor) -> Tensor:
    v = h + float("inf")  # times 0 it is no number
    v.copy_(m.buffer[0])
    return v


OVERWRITING = [
    copied,
    copied_from_a_parameter,
    copied_to_what_has_none,
    copied_to_an_empty_one,
    copied_from_another_type,
    ellipsis_written,
    colon_written,
    view_written,
    rows_and_columns_written,
    filled,
    filled_by_a_tensor,
    zeroed,
    masked_wholly,
    masked_filled,
    compared,
    copied_where_autograd_does_not_see,
    copied_twice,
    infinite,
]


@pytest.mark.parametrize("body", OVERWRITING, ids=lambda body: body.__name__)
def test_what_is_overwritten_has_the_gradients_of_eager(body: Callable[[Any, Tensor], Any]) -> None:
    check(body)


def test_an_overwritten_value_without_gradient_costs_nothing() -> None:
    captured = capture(Program(copied_to_what_has_none), (torch.randn(4, 6),))
    assert not any(node.target is aten.where.self for node in captured.graph.graph.nodes)


# Running statistics


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return _weighted(self.norm(x * self.scale))


NORMS: list[Any] = [
    pytest.param(nn.BatchNorm1d(6), (6,), 3, id="batch norm"),
    pytest.param(nn.BatchNorm1d(6, track_running_stats=False), (6,), 0, id="without statistics"),
    pytest.param(nn.BatchNorm2d(3, affine=False, momentum=0.7), (3, 4, 4), 3, id="not affine"),
    pytest.param(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 4), 2, id="instance norm"),
    pytest.param(nn.InstanceNorm2d(3), (3, 4, 4), 0, id="instance norm without statistics"),
]


@pytest.mark.parametrize(("norm", "shape", "mutations"), NORMS)
def test_running_statistics_are_results(norm: nn.Module, shape: tuple[int, ...], mutations: int) -> None:
    model = Normalised(norm, *shape)
    captured = capture(model, (torch.randn(4, *shape),))
    assert len(captured.mutations) == mutations
    check_against_eager(model, captured, torch.randn(5, *shape))


# Operators


PURE_FORMS: list[Any] = [
    (aten.add_.Tensor, aten.add.Tensor),
    (aten.relu_.default, aten.relu.default),
    (aten.add.out, aten.add.Tensor),
    (aten.masked_fill_.Scalar, aten.masked_fill.Scalar),
    (aten.index_put_.default, aten.index_put.default),
    (aten.normal_.default, aten.normal_functional.default),
    (aten.__ior__.Tensor, aten.__or__.Tensor),
    (aten.topk.values, aten.topk.default),  # two results
    (aten.squeeze_.dim, aten.squeeze.dim),
    (aten._foreach_add_.Scalar, aten._foreach_add.Scalar),
    (aten.set_.source_Tensor, None),
]


@pytest.mark.parametrize(("op", "pure"), PURE_FORMS)
def test_pure_form_is_found_by_its_schema(op: Any, pure: Any) -> None:
    found = pure_form(op)
    assert found == pure or (pure is None and found is not None and not found._schema.is_mutable)


@torch.library.custom_op("whalepy_test::advance", mutates_args=("counter",))
def advance(counter: Tensor, by: float) -> Tensor:
    counter.add_(by)
    return counter * 2


@advance.register_fake
def _(counter: Tensor, by: float) -> Tensor:
    return torch.empty_like(counter)


def test_an_operator_without_a_pure_form_works_on_copies() -> None:
    model = Program(lambda m, h: h * advance(m.buffer[0], 0.5) + m.buffer[0])
    captured = capture(model, (torch.randn(4, 6),))
    assert captured.mutations == ("buffer",)
    check_against_eager(model, captured, torch.randn(5, 6))


def complex_part(m: Any, h: Tensor) -> Tensor:
    z = torch.complex(h, h)
    z.real.mul_(2)
    return torch.view_as_real(z)


def list_write(m: Any, h: Tensor) -> Tensor:
    parts = [h.clone(), h.clone()]
    torch._foreach_add_(parts, 1.0)
    return parts[0]


def resize(m: Any, h: Tensor) -> Tensor:
    z = torch.zeros(2)
    z.resize_(3)
    return h * z.sum()


PURE_FORM_ERRORS: list[Any] = [
    (complex_part, 2, "a write through the view aten.real.default has no pure form"),
    (list_write, 2, "aten._foreach_add_.Scalar writes to a list of tensors"),
    (resize, 2, "aten.resize_.default has no pure form"),
]


@pytest.mark.parametrize(("body", "offset", "message"), PURE_FORM_ERRORS)
def test_a_write_that_has_no_pure_form(body: Callable[[Any, Tensor], Any], offset: int, message: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Program(body), (torch.randn(4, 6),))
    line = inspect.getsourcelines(body)[1] + offset
    fix = "write the pure form: a result instead of a write"
    assert str(caught.value) == f"{message}\n  at:  test_functionalise.py:{line}\n  fix: {fix}"


def test_the_text_of_a_pure_graph() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        h[:, 1] = m.w[0]
        return F.dropout(h, 0.5, training=False).view(-1)

    captured = capture(Program(body), (torch.randn(4, 6),))
    calls = [str(node.target) for node in captured.graph.graph.nodes if node.op == "call_function"]
    wanted = {"aten.mul.Tensor", "aten.add.Tensor", "aten.fill.Tensor", "aten.select_scatter.default"}
    assert wanted | {"aten.reshape.default"} <= set(calls)
    assert not any(name.startswith(("aten.dropout", "aten.view", "aten.fill_", "aten.copy_")) for name in calls)


# Random programs


VIEWS: list[Callable[[Tensor, int], Tensor]] = [
    lambda t, k: t[k % t.shape[0]] if t.dim() else t,
    lambda t, k: t[..., k % 3 :] if t.dim() else t,
    lambda t, k: t[::2] if t.dim() else t,
    lambda t, k: t.transpose(0, -1) if t.dim() > 1 else t,
    lambda t, k: t.reshape(-1),
    lambda t, k: t.unsqueeze(k % (t.dim() + 1)),
    lambda t, k: t.diagonal(k % 2) if t.dim() == 2 else t,
    lambda t, k: t.detach(),
    lambda t, k: t.contiguous(),
    lambda t, k: t.flatten(),
    lambda t, k: t.permute(list(reversed(range(t.dim())))),
    lambda t, k: t.narrow(0, 0, 1) if t.dim() else t,
    lambda t, k: t.to(torch.float32),
    lambda t, k: t.unfold(0, 1, 1) if t.dim() else t,
    lambda t, k: t.squeeze(),
    lambda t, k: t.movedim(0, -1) if t.dim() else t,
    lambda t, k: t.unbind(0)[0] if t.dim() and not k else t,
    lambda t, k: t.chunk(2)[0] if t.dim() else t,
    lambda t, k: t.expand_as(t),
    lambda t, k: t.view_as(t),
]
WRITES: list[Callable[[Tensor, Tensor, int], Any]] = [
    lambda t, s, k: t.mul_(1.5),
    lambda t, s, k: t.add_(s.sum() * 0.1),
    lambda t, s, k: t.fill_(k / 4),
    lambda t, s, k: t.zero_(),
    lambda t, s, k: t.copy_(s.mean()),
    lambda t, s, k: t.clamp_(max=1.0),
    lambda t, s, k: t.masked_fill_(t > 0, 0.5),
    lambda t, s, k: t.__setitem__(t < 0, 0.1),
    lambda t, s, k: t.sub_(t * 0.25),
    lambda t, s, k: t.tanh_(),
    lambda t, s, k: t.unsqueeze_(0),
    lambda t, s, k: t.transpose_(0, -1) if t.dim() else t,
    lambda t, s, k: t.squeeze_(),
    lambda t, s, k: t.index_fill_(0, torch.tensor([0]), 0.7) if t.dim() else t,
]
PURE: list[Callable[[Tensor, Tensor, int], Tensor]] = [
    lambda t, s, k: t * 2,
    lambda t, s, k: t + s.mean(),
    lambda t, s, k: t.clone(),
    lambda t, s, k: torch.sin(t),
]

instructions = st.tuples(
    st.sampled_from(["view", "view", "write", "write", "silent write", "pure", "buffer"]),
    st.integers(0, 19),  # which operator
    st.integers(0, 7),  # which tensor
    st.integers(0, 7),  # which other tensor
    st.integers(0, 3),
)


def interpreted(program: list[tuple[str, int, int, int, int]]) -> Callable[[Any, Tensor], Any]:
    """A body that keeps a pool of tensors and returns all of it."""

    def body(m: Any, h: Tensor) -> list[Tensor]:
        pool = [h]
        for kind, which, target, other, k in program:
            t, s = pool[target % len(pool)], pool[other % len(pool)]
            if kind == "view":
                pool.append(VIEWS[which % len(VIEWS)](t, k))
            elif kind == "pure":
                pool.append(PURE[which % len(PURE)](t, s, k))
            elif kind == "write":
                WRITES[which % len(WRITES)](t, s, k)
            elif kind == "silent write":
                with torch.no_grad():
                    WRITES[which % len(WRITES)](t, s, k)
            else:
                pool.append(m.buffer[k % 3])
        return pool

    return body


def may_be_refused(program: list[tuple[str, int, int, int, int]]) -> bool:
    """Whether an error is in order: torch cannot turn every view; unbind and chunk ask for the number of rows."""
    turns = [which % len(WRITES) in (10, 11, 12) for kind, which, *_ in program if kind.endswith("write")]
    chunks = [which % len(VIEWS) in (16, 17) for kind, which, *_ in program if kind == "view"]
    return any(turns) or any(chunks)


def runs_eagerly(model: nn.Module, x: Tensor) -> bool:
    """Whether autograd takes the program: it forbids some writes, and some only in backward."""
    try:
        copy.deepcopy(model)(x).backward()
    except (RuntimeError, IndexError):
        return False
    return True


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(instructions, min_size=2, max_size=9))
def test_random_program_equals_eager(program: list[tuple[str, int, int, int, int]]) -> None:
    model = Program(interpreted(program))
    x = torch.randn(4, 6)
    assume(any(kind.endswith("write") for kind, *_ in program) and runs_eagerly(model, x))
    try:
        captured = capture(model, (x,))
    except CaptureError:
        assert may_be_refused(program)
        reject()
    assert not any(writes(node) for node in captured.graph.graph.nodes)
    for rows in (4, 3):
        x = torch.randn(rows, 6)
        if captured.check_sizes(captured.bind([(rows, 6)])) is None and runs_eagerly(model, x):
            check_against_eager(model, captured, x, tolerance=1e-5)
