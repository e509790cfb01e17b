"""The compiled model of a captured program: rewritten graphs, run step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.errors import BatchError, WhaleError
from whalepy.planner.decide import Decisions
from whalepy.planner.plan import Plan
from whalepy.program.analysis import Program
from whalepy.program.capture import Captured
from whalepy.program.capture_wrapper import Wants
from whalepy.runtime.arguments import Arguments, constants_of, leaf_names, leaf_shapes, normal, whole_example
from whalepy.runtime.build import Analysed, Recipe, analysed, built, captured_program
from whalepy.runtime.extents import Binder, Grid, StepSizes, chunk
from whalepy.runtime.groups import Group
from whalepy.runtime.parallel import ParallelModel
from whalepy.runtime.programs import verify_ranks
from whalepy.runtime.reach import Reach, noting
from whalepy.runtime.steps import StepProgram, batch_symbols, place_on, rows_in, sizes_of_microbatch
from whalepy.runtime.storage import Stored, reduce_gradients, store

Planner = Callable[[Arguments], tuple[Plan, Analysed]]
"""Plans for inputs like the example's; collective."""


@dataclass(frozen=True)
class Runnable:
    """A program ready to run, and how the parameters it reads are stored."""

    program: StepProgram
    stored: Mapping[str, Stored]
    symbols: frozenset[sympy.Symbol]
    prologue: StepProgram | None = None
    summed: tuple[bool, ...] = ()
    """Per mutated buffer: its new values are summed over microbatches."""

    @property
    def captured(self) -> Captured:
        """The captured graph behind it."""
        return self.program.captured


class CapturedModel(ParallelModel):
    """A ParallelModel that runs rewritten graphs."""

    def __init__(self, recipe: Recipe, device: torch.device, host: Group, planner: Planner) -> None:
        super().__init__(recipe, device, host)
        self._planner = planner
        self._runnables: dict[Any, Runnable] = {}

    def start(self, example: Arguments) -> None:
        """Plan for inputs like these, open the plan's groups and cut the parameters. Collective; once."""
        plan, main = self._planner(example)
        self._take_place(plan)
        _check_constants(main.program.captured)
        self._chains = main.chains
        self._ties = main.program.captured.ties
        dims = main.program.captured.batch_inputs
        self._batch_dims = dict(zip(leaf_names(example), dims, strict=True))
        key = (True, "loss", pytree.tree_structure(example), constants_of(pytree.tree_leaves(example)))
        self._runnables[key] = self._runnable(main)
        self._stored.update(self._runnables[key].stored)
        self._store_parameters()

    def _build(self, example: Arguments, *, training: bool, wants: Wants) -> Runnable:
        """A program for other arguments than the example's, under the same plan."""
        recipe = self._recipe
        if wants == "outputs" and not self._has_targets(example):
            recipe = replace(recipe, loss_fn=None)
        captured = captured_program(recipe, *example, training=training, wants=wants)
        plan = self.plan
        count = plan.microbatches if training and wants == "loss" else 1
        made, _ = built(
            analysed(captured, leaf_shapes(example), sync_batchnorm=recipe.sync_batchnorm),
            plan.speeds,
            plan.orders,
            base=self._chains,
            keep_rows=wants == "outputs",
            microbatches=count,
        )
        verify_ranks(made, plan.rank_of, count)
        return self._runnable(made)

    def _has_targets(self, example: Arguments) -> bool:
        """Whether these are the arguments of a step, targets of `loss_fn` among them."""
        return set(leaf_names(example)) == set(self._batch_dims)

    def _runnable(self, made: Analysed) -> Runnable:
        binder = self._binder(made.decisions)
        prologue = None
        if made.prologue is not None:
            program, decisions, graph = made.prologue
            prologue = StepProgram(program.captured, graph, self._binder(decisions))
        captured = made.program.captured
        for graph in (made.rewritten.graph, *([made.prologue[2].graph] if made.prologue else [])):
            place_on(graph, self._device)
        step = StepProgram(captured, made.rewritten, binder)
        stored = self._boxes(made.program, made.decisions, binder)
        return Runnable(step, stored, batch_symbols(captured), prologue, made.summed)

    def _binder(self, decisions: Decisions) -> Binder:
        grid = Grid(decisions.mesh, decisions.cuts, decisions.row_cuts)
        return Binder(grid, self._placement.coordinates, self._placement.groups, self.plan.seed)

    def _boxes(self, program: Program, decisions: Decisions, binder: Binder) -> dict[str, Stored]:
        return {
            name: store(program, decisions, binder, name, i)
            for i, op in enumerate(program.operators)
            if op.kind == "parameter" and (name := program.placeholder(i).name)
        }

    # -- steps

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch, on every rank; adds to `.grad`."""
        runnable, leaves, sizes = self._agreed(args, kwargs, training=True, wants="loss")
        parameters = dict(self.named_parameters())
        tensors, read = self._tensors(runnable, parameters, grad=True)
        losses: list[torch.Tensor] = []
        written: list[tuple[Any, ...]] = []
        self._run_prologue(runnable, tensors, leaves, sizes)
        for m, (part, size) in enumerate(self._microbatches(runnable, leaves, sizes)):
            reach = Reach() if runnable.program.leaves_empty(size) else None
            with noting(reach):
                outputs = runnable.program.run(tensors, part, size, self._step, m)
            losses.append(outputs[0].detach())
            loss = outputs[0] if reach is None else reach.tie(outputs[0], list(read.values()), self._host)
            if loss.requires_grad:
                loss.backward()
            written.append(tuple(value.detach() for value in outputs[runnable.captured.results :]))
        self._write_buffers(runnable, written)
        self._reduce_gradients(runnable, read, parameters)
        self._step += 1
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _reduce_gradients(
        self, runnable: Runnable, read: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        reduce_gradients(list(runnable.stored.values()), read, parameters)

    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch in evaluation mode, on every rank."""
        runnable, leaves, sizes = self._agreed(args, kwargs, training=False, wants="loss")
        with torch.no_grad():
            tensors, _ = self._tensors(runnable, dict(self.named_parameters()), grad=False)
            return runnable.program.run(tensors, leaves, self._whole(runnable, sizes), self._step)[0].detach()

    def _outputs(self, *args: Any, **kwargs: Any) -> Any:
        runnable, leaves, sizes = self._agreed(args, kwargs, training=self.training, wants="outputs")
        tensors, _ = self._tensors(runnable, dict(self.named_parameters()), grad=False)
        outputs = runnable.program.run(tensors, leaves, self._whole(runnable, sizes), self._step)
        return runnable.captured.unflatten(outputs[: runnable.captured.results])

    def _tensors(
        self, runnable: Runnable, parameters: Mapping[str, nn.Parameter], *, grad: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the program reads by name, and the parameters among it, as leaves of this step's gradients."""
        tensors: dict[str, torch.Tensor] = {}
        read: dict[str, torch.Tensor] = {}
        buffers = dict(self.named_buffers())
        for place in runnable.captured.placeholders:
            if place.kind == "parameter":
                parameter = parameters[place.name]
                leaf = self._read(runnable, place.name, parameter.detach())
                read[place.name] = tensors[place.name] = leaf.requires_grad_(grad and parameter.requires_grad)
            elif place.kind == "buffer":
                tensors[place.name] = buffers[place.name]
            elif place.kind == "constant" and place.value is not None:
                tensors[place.name] = _placed(place.value, self._placement.device)
        return tensors, read

    def _read(self, runnable: Runnable, name: str, box: torch.Tensor) -> torch.Tensor:
        """The parameter as the program reads it; another program than the trained one may read it in another layout."""
        own, trained = runnable.stored[name], self._stored.get(name)
        if trained is None or trained.cut == own.cut:
            return own.read(box).detach()
        return own.read(own.box(trained.whole(box))).detach()

    def _run_prologue(
        self, runnable: Runnable, tensors: dict[str, torch.Tensor], leaves: list[Any], sizes: dict[sympy.Symbol, int]
    ) -> None:
        """What microbatches must know of the whole batch, beside the tensors they read."""
        if runnable.prologue is None:
            return
        with torch.no_grad():
            values = runnable.prologue.run(tensors, leaves, self._whole(runnable, sizes), self._step)
        tensors.update({f"prologue[{k}]": value for k, value in enumerate(values)})

    def _write_buffers(self, runnable: Runnable, written: list[tuple[Any, ...]]) -> None:
        """New buffer values, once per step: parts of microbatches summed, others as the first gave them."""
        buffers = dict(self.named_buffers())
        with torch.no_grad():
            for k, name in enumerate(runnable.captured.mutations):
                values = [outputs[k] for outputs in written]
                summed = len(values) > 1 and runnable.summed[k]
                buffers[name].copy_(torch.stack(values).sum(0) if summed else values[0])

    # -- sizes and agreement

    def _agreed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, wants: Wants
    ) -> tuple[Runnable, list[Any], dict[sympy.Symbol, int]]:
        """The program for these arguments, their leaves on the device, and the sizes all ranks agreed on."""
        example = normal(args, kwargs)
        leaves, _, shapes = self._agree(example, (training, wants))
        key = (training, wants, pytree.tree_structure(example), constants_of(leaves))

        def runnable_of(key: Any) -> Runnable:
            if key not in self._runnables:
                self._runnables[key] = self._build(whole_example(example, shapes), training=training, wants=wants)
            return self._runnables[key]

        runnable = runnable_of(key)
        bindings = runnable.captured.bind(shapes)
        if runnable.captured.branches_otherwise(bindings):
            runnable = runnable_of((*key, _small(shapes)))
            bindings = runnable.captured.bind(shapes)
        violated = runnable.captured.check_sizes(bindings)
        if violated is not None:
            raise BatchError(violated)
        return runnable, leaves, bindings

    def _whole(self, runnable: Runnable, bindings: dict[sympy.Symbol, int]) -> StepSizes:
        rows = self._grid.rows(rows_in(runnable.captured, bindings))
        return sizes_of_microbatch(bindings, runnable.symbols, rows, first=True)

    def _microbatches(
        self, runnable: Runnable, leaves: list[Any], bindings: dict[sympy.Symbol, int]
    ) -> Iterator[tuple[list[Any], StepSizes]]:
        """The leaves and sizes of each microbatch: this rank's rows as equal as possible, larger ones first."""
        count = self.plan.microbatches
        if count == 1:
            yield leaves, self._whole(runnable, bindings)
            return
        table = self._grid.rows(rows_in(runnable.captured, bindings))
        mine = table[self._grid.row_coordinates(self._placement.coordinates)]
        for m in range(count):
            start, length = chunk(mine, count, m)
            part = [
                leaf.narrow(dim, start, length) if dim is not None else leaf
                for leaf, dim in zip(leaves, runnable.captured.batch_inputs, strict=True)
            ]
            rows = {at: chunk(n, count, m)[1] for at, n in table.items()}
            yield part, sizes_of_microbatch(bindings, runnable.symbols, rows, first=m == 0)


def _small(shapes: Sequence[tuple[int, ...] | None]) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes with every size of 2 and more taken as one: those for which one capture does not serve all."""
    return tuple(None if shape is None else tuple(min(size, 2) for size in shape) for shape in shapes)


def _check_constants(captured: Captured) -> None:
    """WhaleError: the forward of a model on the meta device makes a tensor of numbers, which have no value there."""
    read = {node.name for node in captured.graph.graph.find_nodes(op="placeholder") if node.users}
    for place in captured.placeholders:
        value = place.value
        if place.kind != "constant" or value is None or value.device.type != "meta":
            continue
        if place.node in read and value.numel():
            raise WhaleError(
                f"the forward makes a tensor of numbers, {place.name}, which has no values on the meta device",
                fix="build the model on the cpu; whalepy.plan takes it as it is",
            )


def _placed(constant: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A constant on the rank's device; one on meta has no elements, or nothing reads it."""
    return torch.empty_like(constant, device=device) if constant.device.type == "meta" else constant.to(device)
