"""The compiled model: what a user trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
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
from whalepy.runtime.agreement import Told, agree
from whalepy.runtime.arguments import (
    Arguments,
    as_arguments,
    constants_of,
    global_shapes,
    leaf_names,
    missing_rows,
    normal,
    structure_of,
    whole_example,
)
from whalepy.runtime.build import Analysed, Recipe, analysed, built, captured_program, leaf_shapes
from whalepy.runtime.extents import Binder, Grid, StepSizes, chunk
from whalepy.runtime.groups import Group, make_groups
from whalepy.runtime.initialise import initial_values
from whalepy.runtime.norms import Placement, gradient_norm
from whalepy.runtime.rows import RowSampler, local_rows
from whalepy.runtime.steps import StepProgram, batch_symbols, place_on, rows_in, sizes_of_microbatch
from whalepy.runtime.storage import Stored, broadcast, reduce_gradients, store


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


class _Holder(nn.Module):
    """A node of the local model's module tree: parameters and buffers under their own names."""


class ParallelModel(nn.Module):
    """The distributed program of one rank; `nn.Module` with the local model's parameter names."""

    def __init__(self, recipe: Recipe, device: torch.device, host: Group, planner: Planner) -> None:
        super().__init__()
        self._recipe = recipe
        self._device = device
        self._host = host
        self._planner = planner
        self._plan: Plan | None = None
        self._step = 0
        self._runnables: dict[Any, Runnable] = {}
        self._stored: dict[str, Stored] = {}
        self._unknown: set[str] = set()

    def start(self, example: Arguments) -> None:
        """Plan for inputs like these, open the plan's groups and cut the parameters. Collective; once."""
        plan, main = self._planner(example)
        host = self._host
        coordinates = plan.coordinates_of(host.position)
        groups = make_groups(plan.mesh, plan.rank_of, host.position, self._device)
        self._placement = Placement(self._device, host, groups, coordinates)
        self._grid = Grid(plan.mesh, plan.cuts, plan.row_cuts)
        self._chains = main.chains
        self._ties = main.program.captured.ties
        dims = main.program.captured.batch_inputs
        self._batch_dims = dict(zip(leaf_names(example), dims, strict=True))
        key = (True, "loss", pytree.tree_structure(example), constants_of(pytree.tree_leaves(example)))
        self._plan = plan
        self._runnables[key] = self._runnable(main)
        self._stored.update(self._runnables[key].stored)
        self._store_parameters()

    @property
    def plan(self) -> Plan:
        """The plan that all ranks run."""
        return self._started()

    def _started(self) -> Plan:
        if self._plan is None:
            raise WhaleError(
                "the model is not captured yet: compile was given no example_inputs",
                fix="give compile example_inputs=, or call parallel.local_batch(global_batch) first",
            )
        return self._plan

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The local model's names; one parameter per stored box, ties once."""
        self._started()
        return super().named_parameters(*args, **kwargs)

    # -- construction

    def _store_parameters(self) -> None:
        """Cut every value of the local model to this rank's box, one at a time; rank 0's values win."""
        trainable = {name: p.requires_grad for name, p in self._recipe.model.named_parameters()}
        for name, own, known in initial_values(self._recipe.model, self._device):
            whole = broadcast(self._host, own)
            entry = self._stored.get(name)
            box = (whole if entry is None else entry.box(whole)).clone()
            if not known:
                self._unknown.add(name)
            self._attach(name, nn.Parameter(box, trainable[name]) if name in trainable else box)

    def _attach(self, name: str, value: torch.Tensor) -> None:
        """Keep a value under its name in the local model, also where a method of this class has the same name."""
        *path, last = name.split(".")
        holder: nn.Module = self
        for part in path:
            child = holder._modules.setdefault(part, _Holder())
            assert child is not None
            holder = child
        if isinstance(value, nn.Parameter):
            holder._parameters[last] = value
        else:
            holder._buffers[last] = value

    def _build(self, example: Arguments, *, training: bool, wants: Wants) -> Runnable:
        """A program for other arguments than the example's, under the same plan."""
        captured = captured_program(self._recipe, *example, training=training, wants=wants)
        plan = self.plan
        made, _ = built(
            analysed(captured, leaf_shapes(example)),
            plan.speeds,
            plan.orders,
            base=self._chains,
            keep_rows=wants == "outputs",
            microbatches=plan.microbatches if training and wants == "loss" else 1,
        )
        return self._runnable(made)

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
        """The loss that the local model would return for the global batch, on every rank; adds to `.grad`.

        `args` and `kwargs` are this rank's rows, as `local_batch` gives them. Raises BatchError on all ranks alike.
        """
        runnable, leaves, sizes = self._agreed(args, kwargs, training=True, wants="loss")
        parameters = dict(self.named_parameters())
        tensors, read = self._tensors(runnable, parameters, grad=True)
        losses: list[torch.Tensor] = []
        written: list[tuple[Any, ...]] = []
        self._run_prologue(runnable, tensors, leaves, sizes)
        for m, (part, size) in enumerate(self._microbatches(runnable, leaves, sizes)):
            outputs = runnable.program.run(tensors, part, size, self._step, m)
            losses.append(outputs[0].detach())
            if outputs[0].requires_grad:
                outputs[0].backward()
            written.append(tuple(value.detach() for value in outputs[runnable.captured.results :]))
        self._write_buffers(runnable, written)
        reduce_gradients(list(runnable.stored.values()), read, parameters)
        self._step += 1
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss in evaluation mode for the global batch, on every rank; changes nothing."""
        runnable, leaves, sizes = self._agreed(args, kwargs, training=False, wants="loss")
        with torch.no_grad():
            tensors, _ = self._tensors(runnable, dict(self.named_parameters()), grad=False)
            return runnable.program.run(tensors, leaves, self._whole(runnable, sizes), self._step)[0].detach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for this rank's rows, under no_grad."""
        if torch.is_grad_enabled():
            raise WhaleError(
                "parallel(...) with gradients is not there yet",
                fix="call parallel.train_step(...) to train, or wrap the call in torch.no_grad()",
            )
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
                tensors[place.name] = place.value.to(self._placement.device)
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
        self._started()
        if self._unknown:
            raise WhaleError(
                f"nothing initialised {', '.join(sorted(self._unknown))}: the model is on the meta device",
                fix="give its modules reset_parameters(), or call parallel.load_full_state_dict(...) first",
            )
        example = normal(args, kwargs)
        leaves, spec = pytree.tree_flatten(example)
        key = (training, wants, spec, constants_of(leaves))
        names = leaf_names(example)
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(names, leaves, strict=True))
        told = Told(self._step, structure_of(key), tuple(leaf_shapes(example)), missing_rows(names, leaves, dims))
        shapes = global_shapes(agree(self._placement.host, told), dims, self.plan, names)
        if key not in self._runnables:
            self._runnables[key] = self._build(whole_example(example, shapes), training=training, wants=wants)
        runnable = self._runnables[key]
        bindings = runnable.captured.bind(shapes)
        violated = runnable.captured.check_sizes(bindings)
        if violated is not None:
            raise BatchError(violated)
        device = self._placement.device
        return runnable, [v.to(device) if isinstance(v, torch.Tensor) else v for v in leaves], bindings

    def _row_dim(self, name: str, leaf: Any) -> int | None:
        """The batch dim of an input: as at capture, or for one not seen there by `batch_dim`."""
        if name in self._batch_dims or not isinstance(leaf, torch.Tensor):
            return self._batch_dims.get(name)
        dim = self._recipe.batch_dim if isinstance(self._recipe.batch_dim, int) else None
        return dim if dim is not None and leaf.ndim > dim else None

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

    # -- rows

    def local_batch(self, global_batch: Any) -> Any:
        """This rank's rows of a global batch: a tuple, dict or tensor; the same structure and keys on every rank."""
        args, kwargs = as_arguments(global_batch)
        if self._plan is None:
            self.start((args, kwargs))
        names = leaf_names((args, kwargs))
        leaves = pytree.tree_leaves((args, kwargs))
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(names, leaves, strict=True))
        args, kwargs = local_rows((args, kwargs), dims, self._grid, self._placement.coordinates)
        if isinstance(global_batch, dict):
            return {name: kwargs[name] for name in global_batch}
        return args if isinstance(global_batch, tuple) else (list(args) if isinstance(global_batch, list) else args[0])

    def sampler(
        self, dataset: Sized, *, batch_size: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> RowSampler:
        """A batch sampler of this rank's rows; `batch_size` is global and defaults to the example's."""
        size = self._started().rows if batch_size is None else batch_size
        return RowSampler(dataset, self._grid, self._placement.coordinates, size, shuffle, seed)

    # -- whole values

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The local model's state: exactly its keys, whole values. Collective."""
        return self._full(self._recipe.model.state_dict(keep_vars=True), gradients=False)

    def full_gradients(self) -> dict[str, torch.Tensor | None]:
        """The local model's gradients by parameter name (ties once), whole; None where the local model's is. Collective."""
        parameters = dict(self.named_parameters())
        return {
            name: None if p.grad is None else self._whole_value(name, p.grad) for name, p in parameters.items()
        }

    def _full(self, keys: Mapping[str, torch.Tensor], *, gradients: bool) -> dict[str, torch.Tensor]:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        first = {alias: name for alias, name in self._ties.items()}
        return {key: self._whole_value(first.get(key, key), own[first.get(key, key)].detach()) for key in keys}

    def _whole_value(self, name: str, box: torch.Tensor) -> torch.Tensor:
        entry = self._stored.get(name)
        return box.detach().clone() if entry is None else entry.whole(box.detach()).clone()

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a local model's state; rank 0's values win. Collective. Raises WhaleError for other keys."""
        expected = set(self._recipe.model.state_dict(keep_vars=True))
        if set(state) != expected:
            missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
            raise WhaleError(f"the state does not fit the model: missing {missing}, unexpected {extra}")
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for key in expected - set(self._ties):
                whole = broadcast(self._placement.host, state[key].to(self._placement.device, own[key].dtype))
                entry = self._stored.get(key)
                own[key].copy_(whole if entry is None else entry.box(whole))
        self._unknown -= expected

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """The norm of the whole gradient before clipping it to `max_norm`; the same bits on every rank. Collective."""
        total = gradient_norm(dict(self.named_parameters()), self._stored, self._placement, norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return total

    # -- looking inside

    def program(self, rank: int) -> Any:
        """The program that `rank` runs; `str` of it shows every operator, bridge and layout."""
        return self.plan.program(rank)

    def explain(self) -> str:
        """What runs replicated for want of a rule, and why this plan."""
        return self.plan.explain()
