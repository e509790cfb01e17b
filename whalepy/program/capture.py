"""The captured model: one pure graph, the values it reads, and what it assumes about sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from whalepy.errors import CaptureError
from whalepy.program.capture_devices import with_device
from whalepy.program.capture_export import check_arguments, export_freely
from whalepy.program.capture_gradients import make_dense, settle_gradients
from whalepy.program.capture_inputs import BatchDim, batch_dims, flatten_inputs
from whalepy.program.capture_mutations import check_memory, keep_mutations
from whalepy.program.capture_order import settle_order
from whalepy.program.capture_placeholders import Kind, Placeholder, input_sizes, name_placeholders, ties_of
from whalepy.program.capture_sizes import (
    Bindings,
    Guard,
    InputSizes,
    all_guards,
    bind_sizes,
    branches_otherwise,
    guards_over,
    line_that_fixed,
    violated,
)
from whalepy.program.capture_state import check_attributes
from whalepy.program.capture_warnings import check_backwards, warnings_of
from whalepy.program.capture_wrapper import CaptureWrapper, OutputTree, Wants, loss_call
from whalepy.program.functionalise import functionalise
from whalepy.program.inline import inline

__all__ = ["Bindings", "Captured", "Guard", "InputSizes", "Kind", "Placeholder", "capture"]


@dataclass(frozen=True)
class Captured:
    """A pure graph of the model: placeholders for everything it reads, no write, no region.

    Every node has meta["val"] (fake tensor, symbolic size, or a tuple), meta["where"] (file:line of the user's code
    or None), meta["scope"] (ids of the scopes around it, outermost first), meta["no_grad"] and meta["turn"]
    (a number that grows in the order in which the model runs).
    """

    graph: fx.GraphModule
    placeholders: tuple[Placeholder, ...]  # in graph order
    results: int  # the first `results` outputs are the loss (1) or the tensors of the model's output
    mutations: tuple[str, ...]  # buffer names: the other outputs are their new values
    in_spec: pytree.TreeSpec  # of (args, kwargs)
    output: OutputTree | None  # of the model's output, for wants="outputs"
    ties: dict[str, str]  # every other name of a tied parameter or buffer -> its first name
    batch_inputs: tuple[int | None, ...]  # per input leaf: its batch dim
    inputs: tuple[InputSizes, ...]  # the symbolic shapes of the tensor inputs
    guards: tuple[Guard, ...]
    warnings: tuple[str, ...]
    result_rows: tuple[int | None, ...] = ()  # of what is computed ahead of microbatches, per result: the dim of rows

    @property
    def out_spec(self) -> pytree.TreeSpec | None:
        """The tree of the model's output, for wants="outputs"; a dataclass unknown to pytree is one leaf of it."""
        return None if self.output is None else self.output.spec

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's output made of `results`, None standing for what is no tensor; the loss for wants="loss"."""
        return results[0] if self.output is None else self.output.unflatten(results)

    def on(self, device: torch.device) -> Captured:
        """The same graph for parameters and inputs on `device`: it creates its tensors there."""
        known = next((place.value.device for place in self.placeholders if place.value is not None), None)
        return self if known in (None, device) else replace(self, graph=with_device(self.graph, known, device))

    def bind(self, leaf_shapes: Sequence[tuple[int, ...] | None]) -> Bindings:
        """The value of every size symbol. BatchError: a shape that this capture does not serve."""
        return bind_sizes(self.inputs, leaf_shapes)

    def check_sizes(self, bindings: Bindings) -> str | None:
        """A sentence on the first condition the capture relies on that these sizes violate; None if all hold."""
        return violated(self.guards, self.inputs, bindings)

    def branches_otherwise(self, bindings: Bindings) -> bool:
        """Whether sizes of 0 or 1 lead the model into another branch than the captured one."""
        return branches_otherwise(self.guards, bindings)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    batch_dim: BatchDim = 0,
    training: bool = True,
    wants: Wants = "loss",
) -> Captured:
    """The graph of one forward of `model`, in training or evaluation mode, with its loss or its outputs.

    Dims of inputs are symbols wherever the model allows; batch dims always. The model is left as it was.
    CaptureError: the model cannot be captured, has no loss, misses an input, or fixes its batch size.
    """
    kwargs = kwargs or {}
    leaves, in_spec = flatten_inputs(model.forward, args, kwargs)
    dims = batch_dims(leaves, batch_dim)
    call = loss_call(loss_fn, args, kwargs)
    check_arguments(model, *call.model_inputs(args, kwargs), call.trailing + len(call.keywords))
    wrapper = CaptureWrapper(model, loss_fn, wants, [leaf.value for leaf in leaves], in_spec, call, dims)
    program = export_freely(wrapper, leaves, dims, training=training)
    seen = wrapper.seen
    check_backwards(seen.backward_functions)
    ties = ties_of(model)
    flat = inline(program.graph_module)
    placeholders = name_placeholders(flat, program, wrapper, leaves, ties)
    check_attributes(seen.lost, {placeholder.name for placeholder in placeholders})
    functional = functionalise(flat)
    mutations = keep_mutations(functional, placeholders, seen.results, seen.assigned)
    check_memory(mutations, placeholders)
    flat = functional.graph
    settle_gradients(flat, {placeholder.node for placeholder in placeholders if placeholder.kind == "parameter"})
    seen.sparse_gradients = make_dense(flat)
    flat, placeholders = settle_order(flat, placeholders)
    inputs = input_sizes(flat.graph, placeholders)
    guards = all_guards(flat.graph, seen.guard_places, seen.branches)
    _check_batch_is_free(guards, inputs, dims)
    return Captured(
        graph=flat,
        placeholders=placeholders,
        results=seen.results,
        mutations=mutations,
        in_spec=in_spec,
        output=seen.output,
        ties=ties,
        batch_inputs=dims,
        inputs=inputs,
        guards=guards_over(flat.graph, guards, inputs),
        warnings=warnings_of(model, seen),
    )


def _check_batch_is_free(guards: Sequence[Guard], inputs: Sequence[InputSizes], dims: Sequence[int | None]) -> None:
    for sizes in inputs:
        dim = dims[sizes.leaf]
        if dim is not None and not sizes.shape[dim].free_symbols:
            size = int(sizes.shape[dim])
            raise CaptureError(
                f"the model fixes the number of rows: dim {dim} of input {sizes.name} comes out as a number",
                at=line_that_fixed(guards, size),
                fix="read it as x.shape[0], without int(), and never write it as a number; or give batch_dim=",
            )
