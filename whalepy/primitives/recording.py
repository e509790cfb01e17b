"""What torch is told about open scopes, and how a captured node is traced back to them."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch.fx import Node

    from whalepy.primitives.scope import Primitive

KEY = "whalepy"  # our key in node.meta["custom"], which torch and other libraries write to as well


class Entry(NamedTuple):
    """One entering of a primitive: the chain in force after it, and torch's annotation if a capture was running."""

    primitive: Primitive
    chain: tuple[Primitive, ...]
    annotation: AbstractContextManager[None]


open_entries: ContextVar[tuple[Entry, ...]] = ContextVar("whalepy.open_entries", default=())

# A scope written inside `forward` dies with the call, before anyone reads the captured graph: keep what was recorded.
_recorded: dict[int, Primitive] = {}


def open_chain() -> tuple[Primitive, ...]:
    """The primitives open at this point of the program, outermost first."""
    entries = open_entries.get()
    return entries[-1].chain if entries else ()


def annotation_of(chain: Sequence[Primitive]) -> AbstractContextManager[None]:
    """A context in which captured nodes carry `chain`; one that does nothing while no capture is running.

    torch keeps its annotations in a plain global: eager training on several threads must not touch it.
    """
    from torch.fx import traceback

    if not traceback.has_preserved_node_meta():
        return nullcontext()
    _recorded.update((primitive.id, primitive) for primitive in chain)
    return traceback.annotate({KEY: tuple(primitive.id for primitive in chain)})


@contextmanager
def recording() -> Generator[None]:
    """Within it, `torch.export` (not strict) leaves on every node the chain of scopes it ran under.

    Scopes that are already open around it count: they are the outermost part of every chain.
    """
    from torch.fx import traceback

    chain = open_chain()
    with traceback.preserve_node_meta(), annotation_of(chain) if chain else nullcontext():
        yield


def remember(chain: Sequence[Primitive]) -> tuple[int, ...]:
    """The ids of primitives that no capture has seen, for `scope_by_id` to find."""
    _recorded.update((primitive.id, primitive) for primitive in chain)
    return tuple(primitive.id for primitive in chain)


def scope_by_id(scope_id: int) -> Primitive:
    """The primitive whose id a captured node carries. KeyError if no capture has recorded that id."""
    return _recorded[scope_id]


def recorded_chain(node: Node) -> tuple[Primitive, ...]:
    """The primitives a captured node ran under, outermost first; empty outside every scope."""
    return tuple(map(scope_by_id, node.meta.get("custom", {}).get(KEY, ())))


def under_dynamo() -> bool:
    """True while torch.compile reads the calling code: scopes then leave no trace, and break no graph."""
    torch = sys.modules.get("torch")  # never import torch only to ask
    return torch is not None and torch.compiler.is_dynamo_compiling()
