"""What goes into a capture and what comes out: inputs, losses, sizes, state, errors in full."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import whalepy
from tests.program.test_functionalise import check_against_eager, run
from whalepy.errors import BatchError, CaptureError
from whalepy.program.capture import Captured, capture

torch.set_num_threads(1)


class Model(nn.Module):
    """A linear, a buffer, a plain tensor; `body` is the forward."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)
        self.register_buffer("buffer", torch.ones(6))
        self.plain = torch.ones(6)
        self.flag: Any = None
        self.body = body

    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: Any = 1) -> Any:
        return self.body(self, x) if y is None else self.body(self, x, y, scale)


X = torch.randn(8, 6)
LABELS = torch.arange(8) % 6
CAPTURE_WHOLE = "give capture=False and loss_weight= to train the model whole, under one replicate level"


def logits(m: Any, x: Tensor) -> Tensor:
    return m.linear(x)


def total(m: Any, x: Tensor) -> Tensor:
    return m.linear(x).sum()


def line(function: Callable[..., Any], offset: int) -> str:
    """`file.py:line`, `offset` lines below the `def`."""
    return f"test_capture.py:{inspect.getsourcelines(function)[1] + offset}"


def error_of(body: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(Model(body), args or (X,), **options)
    return str(caught.value)


# The loss


@dataclasses.dataclass
class Output:
    loss: Tensor
    logits: Tensor
    cache: object = None


class Attribute:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


LOSSES: dict[str, Callable[..., Any]] = {
    "itself": total,
    "attribute": lambda m, x: Attribute(m.linear(x).sum()),
    "dataclass": lambda m, x: Output(m.linear(x).sum(), x, object()),
    "mapping": lambda m, x: {"logits": x, "loss": m.linear(x).sum()},
    "first of a tuple": lambda m, x: (m.linear(x).sum(), x),
}


@pytest.mark.parametrize("body", LOSSES.values(), ids=LOSSES.keys())
def test_the_loss_is_found(body: Callable[..., Any]) -> None:
    model = Model(body)
    (loss,), _ = run(capture(model, (X,)), X)
    torch.testing.assert_close(loss, model.linear(X).sum())


def smooth(outputs: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    return F.cross_entropy(outputs, target, label_smoothing=smoothing)


LOSS_FUNCTIONS: list[Any] = [
    pytest.param(F.cross_entropy, id="function"),
    pytest.param(nn.CrossEntropyLoss(weight=torch.arange(6.0)), id="module with a buffer"),
    pytest.param(smooth, id="a parameter with a default is no target"),
    pytest.param(lambda outputs, target: F.mse_loss(outputs, F.one_hot(target, 6).float()), id="lambda"),
]


@pytest.mark.parametrize("loss_fn", LOSS_FUNCTIONS)
@pytest.mark.parametrize("as_keywords", [False, True])
def test_loss_fn_takes_the_targets(loss_fn: Callable[..., Tensor], as_keywords: bool) -> None:
    model = Model(logits)
    args, kwargs = ((), {"x": X, "target": LABELS}) if as_keywords else ((X, LABELS), {})
    captured = capture(model, args, kwargs, loss_fn=loss_fn)
    (loss,), _ = run(captured, X, LABELS)
    torch.testing.assert_close(loss, loss_fn(model(X), LABELS))


FORMS = (
    "return the loss itself, an object with .loss, a mapping with 'loss', or a tuple whose first element is the loss;"
    " or pass loss_fn="
)
NO_LOSS: list[Any] = [
    (lambda m, x: {"logits": m.linear(x)}, f"the model returns a dict, in which there is no loss\n  fix: {FORMS}"),
    (lambda m, x: None, f"the model returns None, in which there is no loss\n  fix: {FORMS}"),
    (
        lambda m, x: m.linear(x)[:2],
        "the loss which the model returns has shape [2, 6], not a scalar\n  fix: reduce it, or pass loss_fn=",
    ),
    (
        lambda m, x: x.long().sum(),
        "the loss which the model returns has dtype torch.int64, not a float\n  fix: return a float scalar tensor",
    ),
]


@pytest.mark.parametrize(("body", "message"), NO_LOSS)
def test_what_is_no_loss(body: Callable[..., Any], message: str) -> None:
    assert error_of(body) == message


def test_loss_fn_without_its_target() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Model(logits), (), {"x": X}, loss_fn=F.cross_entropy)
    assert str(caught.value) == (
        "loss_fn requires target, which the example inputs do not have\n"
        "  fix: add the targets to example_inputs: last by position, or by name in a dict"
    )


def test_loss_fn_with_parameters_of_its_own() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(outputs, target) * self.weight

    assert error_of(logits, X, LABELS, loss_fn=Weighted()) == (
        "loss_fn.weight is a parameter of loss_fn, which the model would not train\n"
        "  fix: make it a parameter of the model, or freeze it"
    )


# Inputs


def test_nested_inputs_and_constants() -> None:
    def body(m: Any, x: Tensor, y: Any, scale: Any) -> Tensor:
        assert (scale["name"], scale["count"]) == ("a", 3)
        return (m.linear(x) * y).sum() * scale["count"] + scale["more"][1].sum()

    scale = {"name": "a", "count": 3, "more": [None, torch.ones(8, 2)]}
    captured = capture(Model(body), (X, X), {"scale": scale})
    names = [(place.node, place.name, place.leaf) for place in captured.placeholders if place.kind == "input"]
    assert names == [
        ("x", "args[0]", 0),
        ("y", "args[1]", 1),
        ("scale_more_1", "kwargs['scale']['more'][1]", 5),
    ]
    assert captured.batch_inputs == (0, 0, None, None, None, 0)


def test_equal_tensors_stay_apart() -> None:
    captured = capture(Model(lambda m, x, y, scale: (m.linear(x) * y).sum()), (X, X))
    (loss,), _ = run(captured, X, torch.zeros(8, 6))
    assert loss.item() == 0.0


def test_an_input_of_one_row_has_no_batch() -> None:
    captured = capture(Model(lambda m, x, y, scale: (m.linear(x) * y).sum()), (X, torch.randn(1, 6)))
    assert captured.batch_inputs == (0, None)


BATCH_DIMS: list[Any] = [
    ({"x": 0, "y": None}, (0, None)),  # by the name of the parameter
    ({0: 0, "args[1]": None}, (0, None)),  # by position, by the full name
]


@pytest.mark.parametrize(("batch_dim", "expected"), BATCH_DIMS)
def test_batch_dim_as_a_mapping(batch_dim: Any, expected: tuple[int | None, ...]) -> None:
    body = lambda m, x, y, scale: m.linear(x).sum() + y.sum()  # noqa: E731
    captured = capture(Model(body), (X, torch.randn(3, 6)), batch_dim=batch_dim)
    assert captured.batch_inputs == expected


WRONG_INPUTS: list[Any] = [
    (
        (X, torch.randn(3, 6)),
        {},
        "the inputs differ in their number of rows: args[0] has 8, args[1] has 3\n"
        "  fix: give batch_dim= as a mapping: input -> dim, or None for one that is the same on every rank",
    ),
    ((X,), {"batch_dim": {"z": 0}}, "batch_dim names 'z', which is no input\n  fix: use one of args[0]"),
    (
        (X, object()),
        {},
        "input args[1] is a object, which is neither a tensor nor a plain constant\n"
        "  fix: give tensors, numbers, strings, None, or tuples, lists and dicts of them",
    ),
    (
        (X, LABELS, LABELS),
        {},
        "Model.forward cannot be called with the example inputs: too many positional arguments\n"
        "  fix: give what it takes: Model(x: 'Tensor', y: 'Tensor | None' = None, *, scale: 'Any' = 1) -> 'Any'",
    ),
]


@pytest.mark.parametrize(("args", "options", "message"), WRONG_INPUTS)
def test_wrong_inputs(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    assert error_of(total, *args, **options) == message


# Sizes


def test_one_example_row_leaves_the_batch_free() -> None:
    model = Model(total)
    captured = capture(model, (X[:1],))
    for rows in (1, 2, 5):
        assert captured.check_sizes(captured.bind([(rows, 6)])) is None
        check_against_eager(model, captured, torch.randn(rows, 6))


def test_equal_sizes_of_different_meaning_stay_apart() -> None:
    """6 rows of 6 columns: a comparison of both must not merge them."""

    def body(m: Any, x: Tensor) -> Tensor:
        square = x if x.shape[0] == x.shape[1] else x * 2
        return m.linear(square).sum()

    captured = capture(Model(body), (torch.randn(6, 6),))
    assert captured.inputs[0].shape[0].is_Symbol


def test_the_batch_is_one_symbol() -> None:
    captured = capture(Model(lambda m, x, y, scale: m.linear(x).sum() + y.sum()), (X, torch.randn(8, 3)))
    first, second = (sizes.shape[0] for sizes in captured.inputs)
    assert first == second


def test_bind_names_the_input_that_does_not_fit() -> None:
    captured = capture(Model(lambda m, x, y, scale: m.linear(x).sum() + y.sum()), (X, torch.randn(8, 3)))
    rows, columns = captured.inputs[1].shape
    assert captured.bind([(5, 6), (5, 4), None]) == {rows: 5, columns: 4}
    with pytest.raises(BatchError) as caught:
        captured.bind([(5, 7), (5, 4)])
    assert str(caught.value) == (
        "input args[0] dim 1 has size 7, but the model was captured for size 6 only\n"
        "  fix: give size 6, or compile with example inputs of size 7"
    )
    with pytest.raises(BatchError) as caught:
        captured.bind([(5, 6), (4, 4)])
    assert str(caught.value) == "input args[1] dim 0 has size 4, but must have 5: args[0] dim 0 is 5"
    with pytest.raises(BatchError) as caught:
        captured.bind([(5, 6), None])
    assert str(caught.value) == "input args[1] is no tensor, but it was captured with 2 dims"


def even(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] % 2 == 0:
        return m.linear(x).sum()
    return m.linear(x).mean()


def long(m: Any, x: Tensor) -> Tensor:
    return m.linear(x).sum() if x.shape[0] > 3 else x.sum()


BRANCHES: list[Any] = [
    (even, [(8, True), (2, True), (7, False), (1, False)], "Eq(Mod({s}, 2), 0)", 1),
    (long, [(8, True), (4, True), (3, False), (1, False)], "{s} > 3", 1),
]


@pytest.mark.parametrize(("body", "sizes", "condition", "offset"), BRANCHES)
def test_a_branch_on_a_size_is_a_guard(
    body: Callable[..., Any], sizes: list[tuple[int, bool]], condition: str, offset: int
) -> None:
    captured = capture(Model(body), (X,))
    symbol = captured.inputs[0].shape[0]
    for rows, holds in sizes:
        message = captured.check_sizes(captured.bind([(rows, 6)]))
        place = line(body, offset)
        broken = f"the captured graph holds only where {condition.format(s=symbol)} ({place}),"
        assert message == (None if holds else f"{broken} but {symbol} is {rows} (args[0] dim 0)")


@pytest.mark.parametrize("rows", [lambda x: x.shape[0], lambda x: len(x)])
def test_the_shape_in_a_loss_is_not_baked(rows: Callable[[Tensor], int]) -> None:
    model = Model(lambda m, x: m.linear(x).sum() / rows(x))
    captured = capture(model, (X,))
    check_against_eager(model, captured, torch.randn(3, 6))


def fixed_by_int(m: Any, x: Tensor) -> Tensor:
    rows = int(x.shape[0])
    return m.linear(x).sum() / rows


def fixed_by_view(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    return h.view(8, 2, 3).sum()


def fixed_by_operator(m: Any, x: Tensor) -> Tensor:
    return m.linear(x).sum() * torch.linspace(0, 1, x.shape[0]).sum()


@pytest.mark.parametrize(("body", "offset"), [(fixed_by_int, 1), (fixed_by_view, 2), (fixed_by_operator, 1)])
def test_a_fixed_batch_names_the_line(body: Callable[..., Any], offset: int) -> None:
    assert error_of(body) == (
        "the model fixes the number of rows: dim 0 of input args[0] comes out as a number\n"
        f"  at:  {line(body, offset)}\n"
        "  fix: read it as x.shape[0], without int(), and never write it as a number; or give batch_dim="
    )


# What cannot be captured


def branch(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    return h.sum() if h.sum() > 0 else h.mean()


def python_number(m: Any, x: Tensor) -> Tensor:
    return m.linear(x).sum() * float(x.sum())


@pytest.mark.parametrize(("body", "offset"), [(branch, 2), (python_number, 1)])
def test_a_choice_by_values(body: Callable[..., Any], offset: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert error_of(body) == (
        "the model takes a branch, or a size, that depends on the values in a tensor\n"
        f"  at:  {line(body, offset)}\n"
        f"  fix: use torch.where or torch.cond; or {CAPTURE_WHOLE}"
    )
    assert capfd.readouterr().err == ""  # torch prints the whole graph otherwise


def broken(m: Any, x: Tensor) -> Tensor:
    return m.linear(x.mT).sum()


def test_an_error_of_the_model() -> None:
    message = error_of(broken)
    assert message.startswith("the model cannot be captured: RuntimeError: a and b must have same reduction dim")
    assert message.endswith(f"\n  at:  {line(broken, 1)}\n  fix: change that line, or {CAPTURE_WHOLE}")


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.linear(x).float().sum()


def test_autocast_in_the_model() -> None:
    assert error_of(autocast) == (
        "autocast inside the model is not supported\n"
        f"  at:  {line(autocast, 2)}\n"
        "  fix: remove it, or cast there by hand: x.to(torch.bfloat16)"
    )


def test_autocast_switched_off_is_nothing() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.linear(x).sum()

    model = Model(body)
    check_against_eager(model, capture(model, (X,)), X)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_a_backward_of_ones_own() -> None:
    model = Model(lambda m, x: (Straight.apply(m.linear(x)) * x.sum()).sum())
    check_against_eager(model, capture(model, (X,)), X)


class Reaching(torch.autograd.Function):
    """What it computes depends on a module, which the captured graph would not hand to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        return module(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def reaching(m: Any, x: Tensor) -> Tensor:
    return Reaching.apply(m.linear(x), torch.nn.ReLU()).sum()


def test_a_backward_of_ones_own_with_more_than_tensors_and_numbers() -> None:
    assert error_of(reaching) == (
        "the model uses torch.autograd.Function (Reaching), whose backward is lost in the capture\n"
        f"  at:  {line(reaching, 1)}\n"
        "  fix: make it a torch.library.custom_op with register_autograd,"
        " or give capture=False and loss_weight= to train the model whole"
    )


def hooked(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h.register_hook(lambda grad: grad * 2)
    return h.sum()


def test_a_gradient_hook() -> None:
    assert error_of(hooked) == (
        "the forward registers a gradient hook, which is lost in the capture\n"
        f"  at:  {line(hooked, 2)}\n"
        "  fix: make it part of the forward: a torch.library.custom_op with register_autograd"
    )


# State


def parameter_write(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.linear.weight.mul_(0.9)
    return m.linear(x).sum()


def test_a_write_to_a_parameter() -> None:
    assert error_of(parameter_write) == (
        "the forward writes to the parameter linear.weight\n"
        f"  at:  {line(parameter_write, 2)}\n"
        "  fix: make it a buffer, or compute a new tensor from it"
    )


def plain_write(m: Any, x: Tensor) -> Tensor:
    m.plain.add_(1)
    return (m.linear(x) * m.plain).sum()


def plain_assignment(m: Any, x: Tensor) -> Tensor:
    m.plain = m.plain + 1
    return (m.linear(x) * m.plain).sum()


@pytest.mark.parametrize(("body", "place"), [(plain_write, f"\n  at:  {line(plain_write, 1)}"), (plain_assignment, "")])
def test_state_that_is_no_buffer(body: Callable[..., Any], place: str) -> None:
    assert error_of(body) == (
        f"the forward writes to the attribute plain, which is a tensor but no buffer{place}\n"
        "  fix: register it: self.register_buffer('plain', ..., persistent=False)"
    )


def test_buffers_in_the_same_memory() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.buffer.add_(1)
        return (m.linear(x) * m.first).sum()

    model = Model(body)
    model.register_buffer("first", model.buffer[:1])
    with pytest.raises(CaptureError) as caught:
        capture(model, (X,))
    assert str(caught.value) == (
        "the forward writes to a buffer, and buffer and first lie in the same memory\n"
        "  fix: register a clone, or take the view in the forward"
    )


def test_an_attribute_that_is_only_written() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.flag = x.sum()
        return m.linear(x).sum()

    model = Model(body)
    captured = capture(model, (X,))
    assert captured.warnings == ("the forward assigns flag: the graph keeps neither the new value nor what it read",)
    assert model.flag is None


def test_a_buffer_of_another_shape() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.buffer = torch.cat([m.buffer, m.buffer])
        return m.linear(x).sum()

    assert error_of(body) == (
        "the forward assigns to the buffer buffer a value of another shape or dtype\n"
        "  fix: keep the buffer's shape and dtype, or keep such a value out of the model's state"
    )


def test_the_model_is_left_as_it_was() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.buffer = m.buffer + 1
        m.plain_cache = x
        return (m.linear(x) * m.buffer).sum()

    model = Model(body)
    model.linear.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    captured = capture(model, (X,), training=False)
    assert captured.mutations == ("buffer",)
    assert (model.training, model.linear.training) == (True, False)
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (place,) = (place for place in captured.placeholders if place.name == "linear.weight")
    assert place.value is model.linear.weight


def test_modes() -> None:
    body = lambda m, x: F.dropout(m.linear(x), 0.5, m.training).sum()  # noqa: E731
    model = Model(body).eval()
    training, evaluation = capture(model, (X,)), capture(model, (X,), training=False)
    assert not model.training
    assert "dropout" in str(training.graph.graph)
    assert "dropout" not in str(evaluation.graph.graph)


def test_modules_set_apart_stay_in_evaluation() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).sum()

    model = Frozen()
    assert len(capture(model, (X,)).mutations) == 3
    model.norm.eval()
    assert capture(model, (X,)).mutations == ()


# Outputs


def test_outputs_come_back_in_their_structure() -> None:
    model = Model(lambda m, x: {"out": Output(m.linear(x).sum(), x * 2, object()), "rest": (x + 1, 3)})
    captured = capture(model, (X,), wants="outputs")
    assert captured.results == 3
    results, _ = run(captured, X[:3])
    output = captured.unflatten(results)
    assert isinstance(output["out"], Output)
    assert torch.equal(output["out"].logits, X[:3] * 2)
    assert output["out"].cache is None
    assert torch.equal(output["rest"][0], X[:3] + 1)
    assert output["rest"][1] is None


# Places, scopes, regions


def places(captured: Captured) -> dict[str, Any]:
    return {str(node.target): node.meta["where"] for node in captured.graph.graph.nodes if node.op == "call_function"}


def helper(x: Tensor) -> Tensor:
    return torch.tanh(x)


def test_places_are_the_users_lines() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = helper(m.linear(x))
        return h.sum()

    found = places(capture(Model(body), (X,)))
    assert found["aten.tanh.default"] == line(helper, 1)  # torch's own traces know only functions named forward
    assert found["aten.linear.default"] == line(body, 1)
    assert found["aten.sum.default"] == line(body, 2)


def test_scopes_and_regions_are_on_the_nodes() -> None:
    outer, inner = whalepy.replicate(2), whalepy.split(2)

    def body(m: Any, x: Tensor) -> Tensor:
        with outer:
            h = m.linear(x)
            with inner:
                h = torch.tanh(h)
        with torch.no_grad():
            scale = torch.exp(h).mean()
        return (h * scale).sum()

    model = Model(body)
    captured = capture(model, (X,))
    nodes = {str(node.target): node for node in captured.graph.graph.nodes if node.op == "call_function"}
    scopes = {name: node.meta["scope"] for name, node in nodes.items()}
    assert scopes["aten.linear.default"] == (outer.id,)
    assert scopes["aten.tanh.default"] == (outer.id, inner.id)
    assert scopes["aten.exp.default"] == ()
    assert [name for name, node in nodes.items() if node.meta["no_grad"]] == [
        "aten.detach.default",
        "aten.exp.default",
        "aten.mean.default",
    ]
    check_against_eager(model, captured, X)


def test_every_node_has_its_meta() -> None:
    captured = capture(Model(total), (X,))
    for node in captured.graph.graph.nodes:
        if node.op != "output":
            assert {"val", "where", "scope", "no_grad"} <= node.meta.keys(), node


# Further


def windows(m: Any, x: Tensor) -> Tensor:
    """Paddings to multiples of a window, of sizes that were padded before: each makes the next condition longer."""
    for window in (4, 3, 5, 4, 3, 5):
        pad = (window - x.shape[1] % window) % window
        x = F.pad(x, (0, pad))
        x = x.view(x.shape[0], x.shape[1] // window, window).roll(1, 1).flatten(1)[:, 1:]
    return m.linear(x[:, :6]).sum()


def test_sizes_too_complex_are_fixed_with_a_warning() -> None:
    model = Model(windows)
    captured = capture(model, (torch.randn(8, 31),))
    rows, columns = captured.inputs[0].shape
    assert rows.is_Symbol and columns == 31
    (warning,) = captured.warnings
    assert warning.startswith("sizes other than the number of rows are fixed to those of the example: test_capture.py:")
    check_against_eager(model, captured, torch.randn(3, 31))


def test_torch_cond_survives() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: m.linear(x), lambda x: x * 2, (x,)).sum()

    model = Model(body)
    captured = capture(model, (X,))
    for shift in (-1.0, 1.0):
        values = torch.randn(5, 6) + shift * 10
        expected = model(values)
        (loss,), _ = run(captured, values)
        torch.testing.assert_close(loss, expected)


def test_checkpointing_is_a_warning() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return checkpoint.checkpoint(helper, m.linear(x), use_reentrant=False).sum()

    model = Model(body)
    lost = "the captured graph does not keep it, and compile(recompute=...) is not there yet"
    assert capture(model, (X,)).warnings == (f"torch.utils.checkpoint runs {line(helper, 1)}; {lost}",)
    model.linear.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
    assert capture(model, (X,)).warnings == (f"gradient checkpointing is on in linear (1 in all); {lost}",)


def test_reentrant_checkpointing_is_an_error() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return checkpoint.checkpoint(helper, m.linear(x), use_reentrant=True).sum()

    assert error_of(body) == (
        "the model uses torch.utils.checkpoint with use_reentrant=True, whose gradient is lost in the capture\n"
        f"  at:  {line(body, 1)}\n"
        "  fix: give it use_reentrant=False"
    )


def test_device_literals_follow_the_model() -> None:
    captured = capture(Model(lambda m, x: (m.linear(x) + torch.arange(6)).sum()), (X,))
    moved = captured.on(torch.device("meta"))
    kinds = [node.kwargs["device"] for node in moved.graph.graph.nodes if "device" in node.kwargs]
    assert kinds == [torch.device("meta")]
    assert captured.on(torch.device("cpu")) is captured


def test_capture_under_no_grad_still_has_gradients() -> None:
    model = Model(total)
    with torch.no_grad():
        captured = capture(model, (X,))
    assert not any(node.meta.get("no_grad") for node in captured.graph.graph.nodes)
    check_against_eager(model, captured, X)


def normal_likelihood(m: Any, x: Tensor) -> Tensor:
    mean = m.linear(x)
    return -torch.distributions.Normal(mean, mean.exp()).log_prob(x).mean()


def test_distributions_are_captured_without_their_checks_and_check_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile switches it off
    model = Model(normal_likelihood)
    check_against_eager(model, capture(model, (X,)), torch.randn(3, 6))
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)
