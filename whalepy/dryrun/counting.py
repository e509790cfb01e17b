"""What a step does, operator by operator, counted while it runs on the meta device: nothing is computed or held."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from whalepy.planner.work import Event, Phase


@dataclass(eq=False)
class Counter(TorchDispatchMode):
    """Counts the operators that run inside, and the memory of every tensor that is alive."""

    events: list[Event] = field(default_factory=list[Event])
    phase: Phase = "forward"
    memory: int = 0
    _peak: int = 0
    _held: set[int] = field(default_factory=set[int])
    name: str = ""
    block: int = -1
    """The block of the model that runs in a forward."""
    quadratic: bool = False
    """Whether the operator that runs makes a value with one axis twice, such as attention scores."""
    _backward_block: int = -1
    _keeps_exchanges: bool = False
    _belated: tuple[str, int] = ("", -1)
    """The name and the block of a weight gradient that runs later than the backward pass of its operator."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self.hold(tensor)
        if func.is_view or func.namespace == "profiler" or func._overloadpacket in _FREE:
            return result
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not func._schema.returns:
            made = _written(func, args)
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **(kwargs or {}), out_val=result)) if count is not None else 0
        if _is_causal(func, args, kwargs or {}):
            flops = _causal(flops, given[0].shape[-2])
        traffic = _TRAFFIC.get(func._overloadpacket, _all_bytes)(given, made)
        operator = str(func._overloadpacket).removeprefix("aten.")
        flops = flops or _grouped(operator, given)
        kind = kind_of(_by_tanh(operator, kwargs or {})) or (
            UNALIGNED if func._overloadpacket in _BATCHED and _unaligned(given, made) else ""
        )
        outputs = made[0].numel() if flops else 0
        self._note(flops, traffic, _dtype_of(made + given), operator, kind=kind, outputs=outputs)
        return result

    def collective(self, kind: str, level: int, sent: int) -> None:
        """Note a collective of which this rank sends so many bytes."""
        if self._keeps_exchanges:
            return
        self._note(0, sent, "", kind, collective=kind, level=level)

    def begin(self) -> None:
        """Forget what happened so far, but for what is held."""
        self.events.clear()
        self._peak = self.memory

    def settle(self) -> None:
        """Forget what was held at most so far."""
        self._peak = self.memory

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor until nobody holds it."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._held:
            return
        size = storage.nbytes()
        self._held.add(key)
        self.memory += size
        self._peak = max(self._peak, self.memory)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.memory -= size

    def _note(
        self,
        flops: int,
        traffic: int,
        dtype: str,
        operator: str,
        *,
        kind: str = "",
        collective: str = "",
        level: int = -1,
        outputs: int = 0,
    ) -> None:
        phase: Phase = self.phase if _running_backward() is None else "backward"
        name = self._name() or operator
        block, peak = self._block(phase), max(self._peak, self.memory)
        event = Event(phase, name, flops, traffic, dtype, self.memory, peak, collective, level, block, kind)
        self.events.append(replace(event, outputs=outputs) if outputs else event)
        self._peak = self.memory

    def _name(self) -> str:
        node = _running_backward()
        if node is not None:
            return node.metadata.get(_NAME, "")
        return self.name if self.phase == "forward" else self._belated[0]

    @contextmanager
    def again(self, *, exchanges: bool) -> Generator[None]:
        """In a backward pass, operators inside are run again; collectives only with `exchanges`."""
        before = self._keeps_exchanges
        self._keeps_exchanges = not exchanges and _running_backward() is not None
        try:
            yield
        finally:
            self._keeps_exchanges = before

    def _block(self, phase: Phase) -> int:
        """The block of an event; in a backward that of the operators before, where autograd does not say."""
        if phase == "forward":
            self._backward_block = -1
            return self.block
        node = _running_backward()
        if node is None:
            return self._belated[1]
        self._backward_block = node.metadata.get(_BLOCK, self._backward_block)
        return self._backward_block

    def leave_blocks(self) -> None:
        """What follows lies outside all blocks, until an operator says otherwise."""
        self.name, self.block, self._backward_block = "", -1, -1

    def belated(self, name: str, block: int) -> None:
        """What follows in this phase of the step is a weight gradient of this operator and block."""
        self._belated, self._backward_block = (name, block), block

    @contextmanager
    def during(self, phase: Phase) -> Generator[None]:
        """Events inside belong to a phase of the step."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase, self._belated = before, ("", -1)


_NAME, _BLOCK = "whalepy_name", "whalepy_block"
_aten = torch.ops.aten
_FREE: frozenset[Any] = frozenset(
    (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided, _aten.detach,
     _aten.lift_fresh, _aten._unsafe_view, _aten.sym_size, _aten.alias, _aten._local_scalar_dense)
)  # fmt: skip
"""Nothing is read or written on the device; numbers that an optimizer reads, such as its steps, lie on the host."""


_KINDS = ("convolution", "attention")
_NORMALISES = re.compile(r"(layer|batch|group|rms)_norm|softmax")
# Backward passes from the result alone are products: those of tanh and sigmoid.
_EXPONENTIALS = re.compile(
    r"(exp|exp2|expm1|log|log10|log1p|log2|logaddexp|logsumexp|erf|erfc|sin|cos|tan|sinh|cosh|sigmoid|"
    r"log_sigmoid_forward|(gelu|silu|softplus|mish|elu)(_backward)?)_?"
)


def kind_of(operator: str) -> str:
    """What profiles measure apart from other products and elementwise operators; empty for these."""
    found = next((kind for kind in _KINDS if kind in operator), "")
    if found:
        return f"{found} backward" if "backward" in operator else found
    if "batch_norm" in operator and "backward" not in operator:
        return "batch norm"
    if _NORMALISES.search(operator):
        return "normalise"
    if operator.removesuffix("_") == "tanh":
        return "tanh"
    return "exponential" if _EXPONENTIALS.fullmatch(operator) else ""


def _by_tanh(operator: str, kwargs: Mapping[str, Any]) -> str:
    """The operator that does the work of this one."""
    return "tanh" if kwargs.get("approximate") == "tanh" else operator


_BLOCK_OF_QUERIES = 128
"""Fused attention leaves out blocks of scores, none of which counts. Source: Dao, FlashAttention-2, arXiv:2307.08691,
sections 3.1 and 3.3 (blocks of 64 or 128)."""


def _causal(flops: int, queries: int) -> int:
    """What is computed of attention in which no query reads a later key: of the blocks those up to the diagonal."""
    blocks = max(-(-queries // _BLOCK_OF_QUERIES), 1)
    return flops * (blocks + 1) // (2 * blocks)


def _grouped(operator: str, given: Sequence[torch.Tensor]) -> int:
    """FLOPs of rows by the matrix of their group, and of its backward, for which torch has no formula."""
    times = {"_grouped_mm": 2, "transformers.grouped_mm_fallback": 2, "transformers.grouped_mm_fallback_backward": 4}
    if operator not in times:
        return 0
    left, right = given[:2]
    own = left if left.dim() == 2 else left[0]  # matrices whose columns belong to groups: each works on its own
    return times[operator] * own.numel() * right.shape[-1]


UNALIGNED = "unaligned batched product"
_BATCHED: frozenset[Any] = frozenset((_aten.bmm, _aten.baddbmm))


def _unaligned(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> bool:
    """Whether rows of the matrices do not all start at a multiple of 16 bytes, which is what matrix units read at once.

    Source: NVIDIA, Matrix Multiplication Background User's Guide, section "Tensor Core Requirements".
    """
    matrices = (tensor for tensor in (*given, *made) if tensor.dim() >= 2 and tensor.numel())
    return any(
        stride * tensor.element_size() % 16
        for tensor in matrices
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride > 1
    )


def mark(result: Any, name: str, block: int) -> None:
    """Name the backward of what an operator has made, and the block it belongs to."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
            function: Any = leaf.grad_fn
            function.metadata.setdefault(_NAME, name)
            function.metadata.setdefault(_BLOCK, block)


def _running_backward() -> Any:
    """The autograd function that runs now; None in a forward."""
    return torch._C._current_autograd_node()


def _written(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an operator without a result writes."""
    wheres = [value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.is_write]
    return [leaf for leaf in pytree.tree_leaves(wheres) if isinstance(leaf, torch.Tensor)]


def _all_bytes(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*given, *made))


def _written_bytes(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in made)


def _picked_bytes(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    """Of what is indexed only the elements that are picked are read."""
    return 2 * sum(tensor.nbytes for tensor in made) + sum(tensor.nbytes for tensor in given[1:])


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether fused attention skips the half of the scores that lie ahead of their query."""
    if "attention" not in str(func._overloadpacket):
        return False
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal"))


_TRAFFIC: dict[Any, Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], int]] = {
    **dict.fromkeys(
        (_aten.zeros, _aten.ones, _aten.full, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.zeros_like,
         _aten.ones_like, _aten.full_like, _aten.arange, _aten.fill_, _aten.zero_),
        _written_bytes,
    ),
    **dict.fromkeys((_aten.embedding, _aten.index, _aten.gather, _aten.index_select), _picked_bytes),
}  # fmt: skip


def _dtype_of(tensors: Sequence[torch.Tensor]) -> str:
    floating = (t.dtype for t in tensors if t.dtype.is_floating_point)
    return str(next(floating, torch.float32)).removeprefix("torch.")
