"""Deferred weight gradients: the pass that lets them wait, for schedules that split the backward pass by operator.

Before:  linear(x, w, b)                    the backward pass gives the gradients of x, w and b
After:   deferred_linear(x, w, b)           it gives that of x; those of w and b wait in the queue of the microbatch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from whalepy.program.analysis import Program
from whalepy.program.call import operator_name
from whalepy.rewrite import kernels
from whalepy.rewrite.deferring import Deferred
from whalepy.rewrite.exchanges import differentiated
from whalepy.rewrite.naming import MOVES, operator_text, places_of
from whalepy.rewrite.rewrite import Rewritten
from whalepy.rewrite.weight_gradients import (
    BatchProduct,
    Convolved,
    Form,
    Looked,
    LookedInShard,
    Product,
    pads_evenly,
)


def deferred(
    rewritten: Rewritten, program: Program, behind: Set[str] | None = None
) -> tuple[Rewritten, tuple[str, ...]]:
    """The graph with every weight gradient deferred that can be; one note per operator and reason that keeps one.

    `behind`: only of calls whose input one of these nodes gives, and whose weight and bias nothing else reads.

    The order of placeholders, the names of nodes and the numbers computed stay as they are. Notes come in the order of
    the graph.
    """
    learning = differentiated(rewritten, program)
    places = places_of(rewritten.graph.graph, program)
    trained = {name for name, place in places.items() if place.kind == "parameter" and name in learning}
    inputs = {name for name, place in places.items() if place.kind in ("input", "received")}
    graph, notes = deferred_graph(rewritten.graph, trained=trained, inputs=inputs, learning=learning, behind=behind)
    return replace(rewritten, graph=graph), notes


def deferred_graph(
    module: fx.GraphModule,
    *,
    trained: Set[str],
    inputs: Set[str],
    learning: Set[str],
    behind: Set[str] | None = None,
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The same for any graph, by names of nodes.

    `trained` are the placeholders of parameters with a gradient, `inputs` those of values that depend on the batch,
    `learning` the nodes that the backward pass goes through.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    weights = _Weights(trained, learning - _depending(graph, inputs))
    kept: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or node.name not in learning:
            continue
        if behind is not None and not _is_behind(node, behind):
            continue
        found = _deferred_call(node, weights)
        if isinstance(found, Deferred):
            node.args, node.kwargs = _positional(node), {}
            node.target = found
        elif found is not None:
            kept[operator_text(_inside(node.target)), found] += 1
    return fx.GraphModule(module, graph), tuple(_note(*key, count) for key, count in kept.items())


def _depending(graph: fx.Graph, inputs: Set[str]) -> set[str]:
    """The inputs and every node that depends on one."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.name in inputs or any(n.name in found for n in node.all_input_nodes):
            found.add(node.name)
    return found


def _note(operator: str, reason: str, count: int) -> str:
    times = f" x{count}" if count > 1 else ""
    return f"{operator}{times} gives its weight gradient in the backward pass: {reason}"


@dataclass(frozen=True)
class _Weights:
    """Which values are trained parameters, or made of them alone."""

    trained: Set[str]
    alone: Set[str]
    """Nodes with a gradient that do not depend on the batch."""

    def holds(self, value: object) -> bool:
        """Whether the value is a trained parameter, or a view of all of it."""
        value = _viewed(value)
        return isinstance(value, fx.Node) and value.op == "placeholder" and value.name in self.trained

    def maker(self, value: object) -> fx.Node | None:
        """What makes a value of weights alone; None where the batch has a part in it, or nothing learns."""
        value = _viewed(value)
        return value if isinstance(value, fx.Node) and value.name in self.alone else None


def _is_behind(node: fx.Node, behind: Set[str]) -> bool:
    """Whether one of these nodes gives the input of a call, and nothing but the call reads its weight and bias.

    Else a part of their gradient would come early, and be taken for all of it (runtime/reduction.py).
    """
    form = _form(node)
    if form is None:
        return False
    args = _positional(node)
    x = _viewed(args[form.x])
    learned = [args[at] for at in (form.weight, form.bias) if at is not None and at < len(args)]
    return isinstance(x, fx.Node) and x.name in behind and all(map(_is_read_once, learned))


def _is_read_once(value: object) -> bool:
    """Whether a value, and all that it is a view of, has one reader; None has nothing to read."""
    while _is_view(value) and len(value.users) == 1:  # type: ignore[union-attr]
        value = value.args[0]  # type: ignore[union-attr]
    return not isinstance(value, fx.Node) or len(value.users) == 1


def _viewed(value: object) -> object:
    """What a value is a view of: itself where it is none."""
    while _is_view(value):
        value = value.args[0]  # type: ignore[union-attr]
    return value


def _is_view(value: object) -> bool:
    return isinstance(value, fx.Node) and operator_name(value.target) in _VIEWS


_VIEWS = {
    *(f"aten.{name}" for name in ("t", "transpose", "permute", "swapaxes", "swapdims", "numpy_T", "mT", "movedim")),
    *(f"aten.{name}" for name in ("moveaxis", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten")),
}
"""They hold the same elements, and autograd keeps no value for their way back: it can be gone twice."""


def _deferred_call(node: fx.Node, weights: _Weights) -> Deferred | str | None:
    """The deferring kernel of a call; why there is none; or None for a call that has no weight."""
    form = _form(node)
    if form is None:
        reads = any(map(weights.holds, node.all_input_nodes)) and not _is_view(node) and node.target not in MOVES
        return "it has no deferred form" if reads else None
    args = _positional(node)
    weight = args[form.weight]
    bias = args[form.bias] if form.bias is not None and form.bias < len(args) else None
    if not weights.holds(weight):
        return _why_no_weight(weights, args[form.x], weight, bias)
    reason = "it computes with complex numbers" if weight.meta["val"].dtype.is_complex else _why_no_form(node, form)
    return reason or Deferred(node.target, form, weights.holds(bias))  # type: ignore[arg-type]


def _why_no_weight(weights: _Weights, x: object, weight: object, bias: object) -> str | None:
    maker = weights.maker(weight)
    if maker is not None:
        over_bridge = maker.target in MOVES
        return (
            "its weight comes over a bridge" if over_bridge else f"its weight is made by {operator_text(maker.target)}"
        )
    if weights.holds(x):
        return "its weight is the first factor"
    return "its weight depends on the batch" if weights.holds(bias) else None


def _inside(target: Any) -> Any:
    wrapped = isinstance(target, kernels.Convolution | kernels.Guarded | kernels.Seeded)
    return target.op if wrapped else target


def _positional(node: fx.Node) -> tuple[Any, ...]:
    """The arguments in order, those given by name among them."""
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    last = max((k for k, argument in enumerate(schema) if argument.name in node.kwargs), default=-1)
    named = (node.kwargs.get(a.name, a.default_value) for a in schema[len(node.args) : last + 1])
    return (*node.args, *named)


def _form(node: fx.Node) -> Form | None:
    """How the operator of a node is differentiated; None where it has no weight."""
    target: Any = node.target
    local = target if isinstance(target, kernels.Convolution) else None
    form = _FORMS.get(operator_name(target if local is None else local.op))
    return replace(form, local=local) if isinstance(form, Convolved) else form


def _why_no_form(node: fx.Node, form: Form) -> str | None:
    """Why a call cannot be deferred, though its operator can."""
    args = _positional(node)
    x, weight = (args[at].meta["val"] for at in (form.x, form.weight))
    match form:
        case Convolved():
            return _why_no_convolution(form, x, weight, args)
        case Product():
            scaled = [name for name in ("beta", "alpha") if name in node.kwargs]
            return f"its product is scaled by {scaled[0]}" if scaled else _matrix(weight)
        case _:
            return None


def _matrix(weight: torch.Tensor) -> str | None:
    return None if weight.ndim == 2 else "its weight is no matrix"


def _why_no_convolution(form: Convolved, x: torch.Tensor, weight: torch.Tensor, args: tuple[Any, ...]) -> str | None:
    if x.ndim != weight.ndim:
        return "its input has no batch"
    given = form.given(args[form.bias + 1 :])
    uneven = given.get("padding") == "same" and not pads_evenly(weight, given.get("dilation", 1))
    return "it pads one side more than the other" if uneven else None


_CONVOLUTION = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")

_FORMS: dict[str, Form] = {
    "aten.linear": Product(0, 1, 2, transposed=True),
    "aten.addmm": Product(1, 2, 0),
    "aten.mm": Product(0, 1),
    "aten.matmul": Product(0, 1),
    "aten.bmm": BatchProduct(),
    "aten.embedding": Looked(),
    "whalepy.rewrite.kernels.masked_embedding": LookedInShard(),
    **{f"aten.conv{dims}d": Convolved(_CONVOLUTION) for dims in (1, 2, 3)},
    **{f"aten.conv_transpose{dims}d": Convolved(_TRANSPOSED, transposed=True) for dims in (1, 2, 3)},
    "aten.convolution": Convolved(_ANY),
}
