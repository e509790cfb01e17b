"""The module that is exported: the user's model and loss, with tensors in and tensors out."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from whalepy.errors import CaptureError
from whalepy.program.capture_branches import Branches, branches_noted
from whalepy.program.capture_builtins import free_lengths, masks_as_given, modules_in_place, unchecked_distributions
from whalepy.program.capture_checks import Checks
from whalepy.program.capture_functions import functions_kept, is_kept
from whalepy.program.capture_places import place_of_error
from whalepy.program.capture_recorder import Recorder
from whalepy.program.capture_state import assigned_attributes, assigned_buffers, state_of

Wants = Literal["loss", "outputs"]

TRAIN_WHOLE = "or give capture=False and loss_weight= to train the model whole, under one replicate level"

_LOSS_FORMS = (
    "return the loss itself, an object with .loss, a mapping with 'loss', or a tuple whose first element is the loss;"
    " or pass loss_fn="
)


@dataclass(frozen=True)
class OutputTree:
    """The structure of the model's output; unregistered dataclasses are opened, other objects become None."""

    spec: pytree.TreeSpec
    leaves: tuple[int | OutputTree | None, ...]  # position among the tensors, a nested dataclass, or not a tensor
    cls: type | None = None

    def unflatten(self, tensors: Sequence[Any]) -> Any:
        """The output with `tensors` in it and None for what is not a tensor."""
        leaves = [
            leaf.unflatten(tensors) if isinstance(leaf, OutputTree) else _pick(tensors, leaf) for leaf in self.leaves
        ]
        tree = pytree.tree_unflatten(leaves, self.spec)
        return tree if self.cls is None else _dataclass_of(self.cls, tree)


def _pick(tensors: Sequence[Any], position: int | None) -> Any:
    return None if position is None else tensors[position]


def _dataclass_of(cls: type, fields: dict[str, Any]) -> Any:
    instance = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


def flatten_output(output: Any) -> tuple[list[torch.Tensor], OutputTree]:
    """The tensors in `output`, in pytree order, and its structure."""
    tensors: list[torch.Tensor] = []
    return tensors, _flatten_into(output, tensors, None)


def _flatten_into(output: Any, tensors: list[torch.Tensor], cls: type | None) -> OutputTree:
    leaves, spec = pytree.tree_flatten(output)
    return OutputTree(spec, tuple(_leaf_into(leaf, tensors) for leaf in leaves), cls)


def _leaf_into(leaf: Any, tensors: list[torch.Tensor]) -> int | OutputTree | None:
    if isinstance(leaf, torch.Tensor):
        tensors.append(leaf)
        return len(tensors) - 1
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        return _flatten_into(fields, tensors, type(leaf))
    return None


def find_loss(output: Any) -> torch.Tensor:
    """The loss in a model's output. CaptureError: there is none, or it is no float scalar."""
    loss = _loss_in(output)
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"the model returns {_kind(output)}, in which there is no loss", fix=_LOSS_FORMS)
    return check_loss(loss, "the loss which the model returns")


def _loss_in(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(getattr(output, "loss", None), torch.Tensor):
        return output.loss
    if isinstance(output, Mapping):
        return output.get("loss")  # pyright: ignore[reportUnknownMemberType]
    return output[0] if isinstance(output, (tuple, list)) and output else None


def check_loss(loss: Any, what: str) -> torch.Tensor:
    """`loss` itself. CaptureError: it is no float scalar tensor."""
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"{what} is {_kind(loss)}, not a tensor", fix="return a float scalar tensor")
    if loss.dim() != 0:
        raise CaptureError(f"{what} has shape {list(loss.shape)}, not a scalar", fix="reduce it, or pass loss_fn=")
    if not loss.dtype.is_floating_point:
        raise CaptureError(f"{what} has dtype {loss.dtype}, not a float", fix="return a float scalar tensor")
    return loss


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "None"


@dataclass(frozen=True)
class LossCall:
    """How loss_fn(outputs, *targets) reads the inputs: so many trailing positional ones, and these keywords."""

    trailing: int
    keywords: tuple[str, ...]

    def model_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What of the inputs goes to the model."""
        kept = args[: len(args) - self.trailing]
        return kept, {key: value for key, value in kwargs.items() if key not in self.keywords}

    def targets(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What of the inputs goes to loss_fn after the outputs."""
        return args[len(args) - self.trailing :], {key: kwargs[key] for key in self.keywords}


def loss_call(loss_fn: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LossCall:
    """Which inputs are targets. CaptureError: fewer inputs than loss_fn requires."""
    if loss_fn is None:
        return LossCall(0, ())
    target = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError) as error:
        raise CaptureError(f"loss_fn {target!r} has no signature", fix="wrap it in a function with one") from error
    named = [p for p in parameters[1:] if p.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)]
    keywords = tuple(p.name for p in named if p.name in kwargs)
    required = [p.name for p in named if p.default is p.empty and p.name not in kwargs and p.kind in positional]
    absent = [p.name for p in named if p.default is p.empty and p.name not in kwargs and p.kind not in positional]
    absent += required[len(args) :]
    if absent:
        raise CaptureError(
            f"loss_fn requires {', '.join(absent)}, which the example inputs do not have",
            fix="add the targets to example_inputs: last by position, or by name in a dict",
        )
    return LossCall(len(required), keywords)


@dataclass
class Seen:
    """What the forward saw while it was traced."""

    output: OutputTree | None = None  # for wants="outputs"
    results: int = 0
    assigned: tuple[str, ...] = ()  # buffers which the forward assigned anew
    lost: tuple[str, ...] = ()  # attributes which the forward assigned
    backward_functions: dict[str, str | None] = field(default_factory=dict[str, str | None])
    """The names of autograd functions before the results, and the user's lines that applied them."""
    guard_places: dict[int, str] = field(default_factory=dict[int, str])  # position in shape_env.guards -> user's line
    branches: dict[Any, str] = field(default_factory=dict[Any, str])  # condition on sizes -> user's line that asked it
    checks_passed: tuple[str, ...] = ()  # user's lines that raise an error for some values, sorted
    sizes_fixed_at: str | None = None  # user's line that made free sizes too complex
    sparse_gradients: tuple[str, ...] = ()  # user's lines of embeddings with sparse gradients
    checkpoint_places: tuple[str, ...] = ()  # user's lines that ran inside torch.utils.checkpoint, sorted


class CaptureWrapper(nn.Module):
    """forward(leaves) -> (results..., values of buffers that the forward assigned anew)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        wants: Wants,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        call: LossCall,
        batch_dims: Sequence[int | None],
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.wants: Wants = wants
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.tensor_positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.spec = spec
        self.call = call
        self.batch_dims = [batch_dims[i] for i in self.tensor_positions]
        self.checks = Checks(CaptureWrapper.forward.__code__)
        self.seen = Seen()  # export puts the attributes of a module back, but not what is in them

    def forward(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows = [leaf.shape[dim] for leaf, dim in zip(leaves, self.batch_dims, strict=True) if dim is not None]
        for other in rows[1:]:
            torch._check(other == rows[0])  # one symbol for the batch
        values = list(self.constants)
        for position, tensor in zip(self.tensor_positions, leaves, strict=True):
            values[position] = tensor
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        before = state_of(self.model)
        free = self.seen.sizes_fixed_at is None
        branches = Branches()
        recorder = Recorder(CaptureWrapper.forward.__code__, _shape_env(leaves), self.checks, branches, bounded=free)
        lost: dict[str, str | None] = {}
        try:
            with recorder, _as_traced(lost), branches_noted(branches, self.checks):
                results = self._run(args, kwargs)
        except GuardOnDataDependentSymNode as error:  # here, since outside torch prints the whole graph to stderr
            raise data_dependent(error) from error
        if self.checks.refused is not None:  # the model caught it, and did what it does after errors
            raise data_dependent(self.checks.refused) from self.checks.refused
        after = state_of(self.model)
        self.seen.guard_places, self.seen.checkpoint_places = recorder.guards, tuple(sorted(recorder.checkpoints))
        self.seen.checks_passed = tuple(sorted(set(self.checks.passed)))
        self.seen.branches = branches.decided
        self.seen.results = len(results)
        self.seen.assigned = assigned_buffers(before, after)
        self.seen.lost = assigned_attributes(before, after)
        self.seen.backward_functions = {name: lost.get(name) for name in custom_backwards(results)}
        return (*results, *(after.buffers[name] for name in self.seen.assigned))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        own_args, own_kwargs = self.call.model_inputs(args, kwargs)
        output = self.model(*own_args, **own_kwargs)
        if self.wants == "outputs":
            tensors, self.seen.output = flatten_output(output)
            return tensors
        if self.loss_fn is None:
            return [find_loss(output)]
        targets, named_targets = self.call.targets(args, kwargs)
        return [check_loss(self.loss_fn(output, *targets, **named_targets), "what loss_fn returns")]


@contextlib.contextmanager
def _as_traced(lost: dict[str, str | None]) -> Generator[None]:
    kept = functions_kept(CaptureWrapper.forward.__code__, lost)
    with free_lengths(), unchecked_distributions(), masks_as_given(), modules_in_place(), kept:
        yield


def data_dependent(error: Exception) -> CaptureError:
    """The error for a branch or a size that depends on values in a tensor."""
    return CaptureError(
        "the model takes a branch, or a size, that depends on the values in a tensor",
        at=place_of_error(error),
        fix=f"use torch.where or torch.cond; {TRAIN_WHOLE}",
    )


def _shape_env(leaves: Sequence[torch.Tensor]) -> Any:
    modes = (getattr(leaf, "fake_mode", None) for leaf in leaves)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def custom_backwards(results: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """The names of the torch.autograd.Function classes between the parameters and `results`, sorted.

    Export records the operators of their forward and drops their backward without a word.
    """
    stack: list[Any] = [result.grad_fn for result in results]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    custom = [n for n in seen if isinstance(n, torch.autograd.function.BackwardCFunction) and not is_kept(n)]
    functions = [getattr(type(node), "_forward_cls", type(node)) for node in custom]
    return tuple(sorted({f.__name__ for f in functions if not f.__module__.startswith(_KEPT_BY_EXPORT)}))


# The autograd of torch.cond and its like, and of torch.library.custom_op: their operators stay whole in the graph.
_KEPT_BY_EXPORT = ("torch._higher_order_ops.", "torch._library.")
