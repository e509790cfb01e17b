"""What each placeholder of the captured graph stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from whalepy.errors import CaptureError
from whalepy.program.capture_inputs import Leaf
from whalepy.program.capture_sizes import InputSizes, size_expr

Kind = Literal["parameter", "buffer", "constant", "input", "received"]
# received: what another stage of the program gives


@dataclass(frozen=True)
class Placeholder:
    """One placeholder of the captured graph and what it stands for."""

    node: str  # name of the fx placeholder
    kind: Kind
    name: str  # in the model (the first name of a tie), or "args[0]", "kwargs['labels']", "kwargs['x'][0]"
    value: torch.Tensor | None  # the live parameter, buffer or constant; None for inputs
    leaf: int | None  # inputs: index into the flattened leaves of (args, kwargs)
    rows: int | None = None  # of what is no leaf, but comes by rows: the dim of the rows


def ties_of(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if first.setdefault(id(tensor), name) != name:
                ties[name] = first[id(tensor)]
    return ties


def name_placeholders(
    module: fx.GraphModule, program: ExportedProgram, wrapper: nn.Module, leaves: Sequence[Leaf], ties: dict[str, str]
) -> tuple[Placeholder, ...]:
    """Renames the placeholders after what they stand for, and merges those of one tied tensor. In graph order."""
    positions = iter([i for i, leaf in enumerate(leaves) if isinstance(leaf.value, torch.Tensor)])
    found: dict[str, tuple[fx.Node, Placeholder]] = {}
    specs = program.graph_signature.input_specs
    for node, spec in zip(module.graph.find_nodes(op="placeholder"), specs, strict=True):
        placeholder = _placeholder(node, spec, program, wrapper, leaves, positions, ties)
        if placeholder.name in found:
            node.replace_all_uses_with(found[placeholder.name][0])
            module.graph.erase_node(node)
        else:
            found[placeholder.name] = (node, placeholder)
    module.recompile()
    return tuple(placeholder for _, placeholder in found.values())


def _placeholder(
    node: fx.Node,
    spec: InputSpec,
    program: ExportedProgram,
    wrapper: nn.Module,
    leaves: Sequence[Leaf],
    positions: Iterator[int],
    ties: dict[str, str],
) -> Placeholder:
    if spec.kind is InputKind.USER_INPUT:
        leaf = next(positions)
        return Placeholder(_rename(node, _short(leaves[leaf])), "input", leaves[leaf].name, None, leaf)
    target = spec.target or ""
    name = ties.get(_stripped(target), _stripped(target))
    own = target.startswith("model.")
    if spec.kind is InputKind.PARAMETER and own:
        return Placeholder(_rename(node, name), "parameter", name, wrapper.get_parameter(f"model.{name}"), None)
    if spec.kind is InputKind.BUFFER and own:
        return Placeholder(_rename(node, name), "buffer", name, wrapper.get_buffer(f"model.{name}"), None)
    return Placeholder(_rename(node, name), "constant", name, _constant(spec, program, wrapper), None)


def _constant(spec: InputSpec, program: ExportedProgram, wrapper: nn.Module) -> torch.Tensor:
    """A tensor that is neither parameter nor buffer of the model: a literal, or part of loss_fn."""
    target = spec.target or ""
    if spec.kind is InputKind.PARAMETER:
        parameter = wrapper.get_parameter(target)
        if parameter.requires_grad:
            raise CaptureError(
                f"{_stripped(target)} is a parameter of loss_fn, which the model would not train",
                fix="make it a parameter of the model, or freeze it",
            )
        return parameter
    if spec.kind is InputKind.BUFFER:
        return wrapper.get_buffer(target)
    value = program.constants.get(target)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"the model uses {_stripped(target)}, a {type(value).__name__}, in its graph", fix="use tensors only"
        )
    return value


def _stripped(target: str) -> str:
    return target.removeprefix("model.")


def _short(leaf: Leaf) -> str:
    """A readable node name: `input_ids` for kwargs['input_ids'], the parameter's name for a positional input."""
    last = leaf.aliases[-1]
    known = isinstance(last, str) and last != leaf.name and leaf.name.count("[") == 1
    return str(last) if known else re.sub(r"^(args|kwargs)\W+", "", leaf.name)


def _rename(node: fx.Node, name: str) -> str:
    clean = re.sub(r"\W+", "_", name).strip("_")
    node._rename(clean if clean.isidentifier() else f"input_{clean}")
    node.target = node.name
    return node.name


def input_sizes(graph: fx.Graph, placeholders: Sequence[Placeholder]) -> tuple[InputSizes, ...]:
    """The symbolic shapes of the inputs, in graph order."""
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    return tuple(
        InputSizes(p.name, p.leaf, tuple(size_expr(size) for size in nodes[p.node].meta["val"].shape))
        for p in placeholders
        if p.leaf is not None
    )
