"""Which writes of the model outlive a step: those to buffers."""

from __future__ import annotations

from collections.abc import Sequence

from whalepy.errors import CaptureError
from whalepy.program.capture_placeholders import Placeholder
from whalepy.program.capture_state import unregistered
from whalepy.program.dead_code import drop_unused
from whalepy.program.functionalise import Functional


def check_memory(names: Sequence[str], placeholders: Sequence[Placeholder]) -> None:
    """CaptureError: a buffer that is written to lies in the memory of another tensor of the model."""
    memory: dict[int, list[str]] = {}
    for placeholder in placeholders:
        if placeholder.value is not None:
            memory.setdefault(placeholder.value.untyped_storage()._cdata, []).append(placeholder.name)
    for shared in memory.values():
        if len(shared) > 1 and not set(names).isdisjoint(shared):
            raise CaptureError(
                f"the forward writes to a buffer, and {' and '.join(shared)} lie in the same memory",
                fix="register a clone, or take the view in the forward",
            )


def keep_mutations(
    functional: Functional, placeholders: Sequence[Placeholder], results: int, assigned: Sequence[str]
) -> tuple[str, ...]:
    """The buffers whose new values are the outputs after `results`; drops the outputs of other writes.

    `assigned` are the buffers which the forward assigned anew, whose values come first. Writes to inputs stay local.
    CaptureError: the forward writes to a parameter.
    """
    by_node = {placeholder.node: placeholder for placeholder in placeholders}
    output = functional.graph.graph.output_node()
    values = list(output.args[0])  # pyright: ignore[reportArgumentType]
    kept, written = values[: results + len(assigned)], values[results + len(assigned) :]
    names = list(assigned)
    for (node, place), value in zip(functional.written.items(), written, strict=True):
        placeholder = by_node[node]
        if placeholder.kind == "parameter":
            raise CaptureError(
                f"the forward writes to the parameter {placeholder.name}",
                at=place,
                fix="make it a buffer, or compute a new tensor from it",
            )
        if placeholder.kind == "constant":
            raise unregistered(placeholder.name, at=place)
        if placeholder.kind != "input" and placeholder.name not in assigned:
            kept.append(value)
            names.append(placeholder.name)
    output.args = (tuple(kept),)
    drop_unused(functional.graph.graph)
    functional.graph.recompile()
    return tuple(names)
