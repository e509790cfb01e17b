"""The compiled model of a captured program: rewritten graphs of its stages, run step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.errors import BatchError, WhaleError
from whalepy.planner.plan import Plan
from whalepy.planner.schedule.actions import Action
from whalepy.planner.schedule.kinds import defers
from whalepy.program.analysis import Program
from whalepy.program.call import results
from whalepy.program.capture import Captured
from whalepy.program.capture_placeholders import Placeholder
from whalepy.program.capture_wrapper import Wants
from whalepy.rewrite.overlap import asynchronous, waits_used
from whalepy.runtime.agreement import Agreement, Otherwise, Told, agree
from whalepy.runtime.arguments import (
    Arguments,
    constants_of,
    leaf_names,
    leaf_shapes,
    normal,
    structure_of,
    whole_example,
)
from whalepy.runtime.boundary import Boundary
from whalepy.runtime.build import Analysed, Recipe, analysed, captured_program
from whalepy.runtime.executor import StepRun
from whalepy.runtime.extents import Binder, StepSizes
from whalepy.runtime.groups import Group, ahead_of_collectives
from whalepy.runtime.parallel import ParallelModel
from whalepy.runtime.pieces import EAGER
from whalepy.runtime.pipeline import Crossed, Pipeline, pipelined, with_scopes_of
from whalepy.runtime.programs import actions_of, verify_ranks, verify_stage
from whalepy.runtime.reduction import Reduction
from whalepy.runtime.steps import StepProgram, batch_symbols, place_on, rows_in, sizes_of_microbatch
from whalepy.runtime.storage import Stored, store

Planner = Callable[[Arguments], tuple[Plan, Pipeline]]
"""Plans for inputs like the example's; collective."""


@dataclass
class Leaves:
    """The parameters that a stage reads, as leaves of a step's gradients; kept where each is its parameter's memory."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    parameters: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    reduction: Reduction | None = None
    """What reduces their gradients, step by step."""

    def of(self, parameters: Mapping[str, nn.Parameter], *, grad: bool) -> dict[str, torch.Tensor] | None:
        """The leaves of these parameters without gradients; None where there are none yet, or others are wanted."""
        if not self.tensors:
            return None
        for name, leaf in self.tensors.items():
            parameter = parameters[name]
            if (
                parameter is not self.parameters[name]
                or parameter.data_ptr() != leaf.data_ptr()
                or parameter.dtype != leaf.dtype
                or parameter.shape != leaf.shape
                or parameter.stride() != leaf.stride()
                or leaf.requires_grad != (grad and parameter.requires_grad)
            ):
                return None
        for leaf in self.tensors.values():
            leaf.grad = None  # a step that failed may have left some
        if self.reduction is not None:
            self.reduction.forget()
        return self.tensors


@dataclass(frozen=True)
class StageRun:
    """The program of one stage, ready to run on this rank, and how the parameters it reads are stored."""

    index: int
    program: StepProgram
    stored: Mapping[str, Stored]
    """In the order in which their gradients come."""
    owned: Collection[str]
    """Parameters that this stage keeps; it borrows the others."""
    busy: Collection[Group]
    """Those that its backward pass communicates over."""
    prologue: StepProgram | None = None
    ahead: tuple[str, ...] = ()
    """What the program of a microbatch calls the results of the prologue."""
    summed: tuple[bool, ...] = ()
    """Per mutated buffer: its new values are summed over microbatches."""
    leaves: Leaves = field(default_factory=Leaves)

    @property
    def captured(self) -> Captured:
        """The captured graph behind it."""
        return self.program.captured

    @cached_property
    def places(self) -> tuple[Placeholder, ...]:
        """What its programs read, once each."""
        programs = [self.captured, *([] if self.prologue is None else [self.prologue.captured])]
        return tuple({place.name: place for one in reversed(programs) for place in one.placeholders}.values())

    @cached_property
    def constants(self) -> dict[str, torch.Tensor]:
        """Those of its programs, as captured."""
        there = (place for place in self.places if place.kind == "constant")
        return {place.name: place.value for place in there if place.value is not None}


@dataclass(frozen=True)
class Runnable:
    """What this rank runs of a program: its stages, what crosses at them, and the order of it all."""

    captured: Captured
    """Of any stage: it knows the sizes of the inputs."""
    stages: Mapping[int, StageRun]
    values: Mapping[tuple[int, int], Boundary]
    parameters: Mapping[tuple[int, int], Boundary]
    actions: tuple[Action, ...]
    microbatches: int
    symbols: frozenset[sympy.Symbol]
    result: torch.dtype
    """Of the first result."""
    reads_inputs: bool
    sizes: dict[Any, StepSizes] = field(default_factory=dict[Any, StepSizes])

    @cached_property
    def busy(self) -> frozenset[Group]:
        """Groups that backward passes communicate over, of any stage: stages may share them."""
        return frozenset(group for stage in self.stages.values() for group in stage.busy)

    @cached_property
    def last_backwards(self) -> frozenset[Action]:
        """Of each stage that is reduced, the backward pass after which all its gradients are there."""
        last = {action.stage: action for action in self.actions if action.op in "BIW"}
        reduced = {action.stage for action in self.actions if action.op == "REDUCE"}
        return frozenset(action for k, action in last.items() if k in reduced and action.op == "B")


class CapturedModel(ParallelModel):
    """A ParallelModel that runs rewritten graphs."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        host: Group,
        planner: Planner,
        off: Collection[str] = (),
        backend: str = EAGER,
    ) -> None:
        """`off`: what makes steps faster and is turned off. `backend`: of torch.compile, for the pieces of programs."""
        super().__init__(recipe, device, host)
        self._planner = planner
        self._off = off
        self._backend = backend
        self._runnables: dict[Any, Runnable] = {}
        self._said: list[Told] | None = None
        """What every rank said in the last step of training."""

    def start(self, example: Arguments) -> None:
        """Plan for inputs like these, open the plan's groups and cut the parameters. Collective; once."""
        plan, main = self._planner(example)
        self._take_place(plan)
        self._open_boundaries(main)
        for stage in main.stages:
            _check_constants(stage.program.captured)
        self._arrangement, self._bases, self._scopes = main.arrangement, main.bases, main.scopes
        captured = main.stages[0].program.captured
        self._ties = captured.ties
        self._keep_owners(main)
        self._batch_dims = dict(zip(leaf_names(example), captured.batch_inputs, strict=True))
        self._constants = constants_of(pytree.tree_leaves(example))
        self._example = pytree.tree_structure(example)
        key = self._key(True, "loss", example)
        self._runnables[key] = self._runnable(main, training=True)
        for stage in self._runnables[key].stages.values():
            self._stored.update({name: entry for name, entry in stage.stored.items() if name in stage.owned})
        self._store_parameters()

    def _key(self, training: bool, wants: Wants, example: Arguments) -> tuple[Any, ...]:
        return training, wants, pytree.tree_structure(example), constants_of(pytree.tree_leaves(example))

    def _keep_owners(self, main: Pipeline) -> None:
        """Which stage keeps each parameter; those that nothing reads are kept by the first."""
        names = [name for name, _ in self._recipe.model.named_parameters()]
        self._owners = {name: main.owners.get(name, 0) for name in names}
        mutated = {name: k for k, stage in enumerate(main.stages) for name in stage.program.captured.mutations}
        self._owners.update(mutated)

    def _build(self, example: Arguments, *, training: bool, wants: Wants) -> Runnable:
        """A program for other arguments than the example's, under the same plan."""
        recipe = self._recipe
        if wants == "outputs" and not self._has_targets(example):
            recipe = replace(recipe, loss_fn=None)
        captured = captured_program(recipe, *example, training=training, wants=wants)
        plan = self.plan
        count = plan.microbatches if training and wants == "loss" else 1
        program = analysed(captured, leaf_shapes(example), sync_batchnorm=recipe.sync_batchnorm)
        made, _ = pipelined(
            with_scopes_of(program, self._scopes),
            self._arrangement,
            [stage.speeds for stage in plan.stages],
            [stage.orders for stage in plan.stages],
            bases=self._bases,
            owners=self._owners,
            keep_rows=wants == "outputs",
            microbatches=count,
            defers=training and wants == "loss" and defers(plan.schedule),
        )
        verify_ranks(made, plan, count, training=training and wants == "loss")
        return self._runnable(made, training=training and wants == "loss")

    def _has_targets(self, example: Arguments) -> bool:
        """Whether these are the arguments of a step, targets of `loss_fn` among them."""
        return set(leaf_names(example)) == set(self._batch_dims)

    def _overlapping(self, main: Pipeline, *, training: bool) -> Pipeline:
        """The same, with operators that run while bridges are under way; verified where the order changes."""
        plan, stages = self.plan, list(main.stages)
        for k in plan.stages_of(self._host.position):
            stage, mesh = stages[k], plan.stages[k].mesh
            graph = stage.rewritten
            if training and self._backend == EAGER and "gradients-during-bridges" not in self._off:
                graph = waits_used(graph, stage.program, mesh)
            stages[k] = replace(stage, rewritten=graph)
            if "asynchronous-bridges" in self._off:
                continue
            started = asynchronous(graph, stage.program, mesh, trains=training)
            if started is not graph:
                stages[k] = replace(stage, rewritten=started)
                verify_stage(stages[k], plan.stages[k], plan.microbatches if training else 1, training=training)
        return replace(main, stages=tuple(stages))

    def _runnable(self, main: Pipeline, *, training: bool) -> Runnable:
        main = self._overlapping(main, training=training)
        plan = self.plan
        count = plan.microbatches if training else 1
        stages = {k: self._stage_run(k, main.stages[k]) for k in plan.stages_of(self._host.position)}
        captured = main.stages[0].program.captured
        last = main.stages[-1].program
        return Runnable(
            captured=captured,
            stages=stages,
            values=self._boundaries(main.values),
            parameters=self._boundaries(main.parameters),
            actions=actions_of(main, plan, self._host.position, count, training=training),
            microbatches=count,
            symbols=batch_symbols(captured),
            result=_result_dtype(last),
            reads_inputs=any(
                place.leaf is not None
                for stage in stages.values()
                for program in (stage.program, stage.prologue)
                if program is not None
                for place in program.captured.placeholders
            ),
        )

    def _stage_run(self, k: int, made: Analysed) -> StageRun:
        binder = self._binder(k)
        ahead = made.prologue
        prologue = None
        if ahead is not None:
            prologue = StepProgram(ahead.program.captured, ahead.rewritten, binder, self._backend)
        for graph in (made.rewritten.graph, *([] if ahead is None else [ahead.rewritten.graph])):
            place_on(graph, self._device)
        step = StepProgram(made.program.captured, made.rewritten, binder, self._backend)
        stored = {
            name: store(made.program, made.decisions, binder, name, i)
            for i in _by_last_gradient(made.program)
            if (name := made.program.placeholder(i).name)
        }
        busy = frozenset(self._places[k].groups[level] for level in made.rewritten.levels_in_backward)
        owned = [name for name in stored if self._owners.get(name, 0) == k]
        ahead_names = () if ahead is None else ahead.names
        return StageRun(k, step, stored, owned, busy, prologue, ahead_names, made.summed)

    def _binder(self, k: int) -> Binder:
        place = self._places[k]
        seed = self.plan.seed if len(self.plan.stages) == 1 else (self.plan.seed, k)
        return Binder(self._grids[k], place.coordinates, place.groups, seed)

    def _open_boundaries(self, main: Pipeline) -> None:
        """A group for each pair of stages and direction, opened in one order on all ranks."""
        self._pairs: dict[tuple[int, int], Any] = {}
        for source, target in sorted({*main.values, *main.parameters}):
            for pair in ((source, target), (target, source)):
                ranks = sorted({*self.plan.stages[source].rank_of, *self.plan.stages[target].rank_of})
                alone = self._host.process_group is None or len(ranks) == 1
                self._pairs[pair] = None if alone else dist.new_group(ranks, backend=_backend(self._device))

    def _boundaries(self, crossed: Mapping[tuple[int, int], tuple[Crossed, ...]]) -> dict[tuple[int, int], Boundary]:
        mine = self.plan.stages_of(self._host.position)
        return {
            (source, target): Boundary(
                values,
                self.plan.stages[source],
                self.plan.stages[target],
                (self._grids[source], self._grids[target]),
                self._host.position,
                self._pairs.get((source, target)),
                self._pairs.get((target, source)),
                self._device,
            )
            for (source, target), values in crossed.items()
            if source in mine or target in mine
        }

    # -- steps

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch, on every rank; adds to `.grad`."""
        agreement = Agreement(self._said) if self._agrees_later else None
        try:
            runnable, run = self._played(args, kwargs, agreement)
        except Otherwise as found:
            agreement = Agreement(everyone=found.everyone)
            runnable, run = self._played(args, kwargs, agreement)
        self._said = None if agreement is None else agreement.said
        self._step += 1
        return self._told_to_all(runnable, run.loss())

    @property
    def _agrees_later(self) -> bool:
        """Whether a step may begin before all ranks have agreed on it, as far as its first collective."""
        return "asynchronous-agreement" not in self._off and len(self.plan.stages) == 1

    def _played(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], agreement: Agreement | None
    ) -> tuple[Runnable, StepRun]:
        """A step of training. Raises Otherwise, with nothing changed, where ranks say otherwise than was assumed."""
        told = {} if agreement is None else {"agree": agreement.agree}
        runnable, leaves, sizes = self._agreed(args, kwargs, training=True, wants="loss", **told)
        run = StepRun(self, runnable, leaves, sizes, self._step, training=True)
        if agreement is None:
            run.play()
        else:
            with ahead_of_collectives(agreement.settle):
                run.play(agreement.settle)
        return runnable, run

    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch in evaluation mode, on every rank."""
        runnable, leaves, sizes = self._agreed(args, kwargs, training=False, wants="loss")
        run = StepRun(self, runnable, leaves, sizes, self._step, training=False)
        with torch.no_grad():
            run.play()
        return self._told_to_all(runnable, run.loss())

    def _outputs(self, *args: Any, **kwargs: Any) -> Any:
        runnable, leaves, sizes = self._agreed(args, kwargs, training=self.training, wants="outputs")
        run = StepRun(self, runnable, leaves, sizes, self._step, training=False)
        run.play()
        last = runnable.stages.get(len(self.plan.stages) - 1)
        return None if last is None else last.captured.unflatten(run.results)

    def _told_to_all(self, runnable: Runnable, loss: torch.Tensor | None) -> torch.Tensor:
        """The loss, which the ranks of the last stage know, on every rank. Collective."""
        ranks = self.plan.stages[-1].rank_of
        if len(ranks) == self._host.size:
            assert loss is not None
            return loss
        told = torch.zeros((), dtype=runnable.result) if loss is None else loss.detach().cpu().clone()
        dist.broadcast(told, src=ranks[0], group=self._host.process_group)
        return told.to(self._device)

    def _playing(self, action: Action) -> AbstractContextManager[Any]:
        """What an action of a step runs in."""
        return nullcontext()

    def _reduction(
        self,
        stage: StageRun,
        read: Mapping[str, torch.Tensor],
        parameters: Mapping[str, nn.Parameter],
        busy: Collection[Group],
    ) -> Reduction:
        """What reduces the gradients of a stage in this step, while others may still communicate over `busy`."""
        kept = stage.leaves
        if kept.reduction is not None and kept.tensors is read:
            return kept.reduction
        groups, delays = self._places[stage.index].groups, self.plan.stages[stage.index].delay_bytes
        early = "early-reduction" not in self._off
        by_group = dict(zip(groups, delays, strict=True))
        made = Reduction(tuple(stage.stored.values()), read, parameters, by_group, early=early, busy=busy)
        if kept.tensors is read:
            kept.reduction = made
        return made

    def _tensors(
        self, stage: StageRun, parameters: Mapping[str, nn.Parameter], *, grad: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the program reads by name, and the parameters among it, as leaves of this step's gradients."""
        read = stage.leaves.of(parameters, grad=grad)
        if read is None:
            read = self._leaves(stage, parameters, grad=grad)
        places = [place.name for place in stage.places if place.kind == "buffer"]
        buffers = dict(self.named_buffers()) if places else {}
        return {**read, **{name: buffers[name] for name in places}, **self._constants_of(stage)}, read

    def _leaves(
        self, stage: StageRun, parameters: Mapping[str, nn.Parameter], *, grad: bool
    ) -> dict[str, torch.Tensor]:
        """The parameters that a stage reads, as leaves; kept for the next step where all are the parameters' memory."""
        found: dict[str, torch.Tensor] = {}
        alike = True
        for place in stage.places:
            if place.kind == "parameter":
                parameter = parameters[place.name]
                box = parameter.detach()
                value = self._read(stage, place.name, box)
                alike = alike and value is box
                found[place.name] = value.detach().requires_grad_(grad and parameter.requires_grad)
        kept = stage.leaves
        kept.tensors, kept.parameters = (found, {name: parameters[name] for name in found}) if alike else ({}, {})
        kept.reduction = None
        return found

    def _constants_of(self, stage: StageRun) -> dict[str, torch.Tensor]:
        """The constants of a stage on the rank's device."""
        for name, value in stage.constants.items():
            if value.device != self._device:
                stage.constants[name] = _placed(value, self._device)
        return stage.constants

    def _read(self, stage: StageRun, name: str, box: torch.Tensor) -> torch.Tensor:
        """The parameter as the program reads it."""
        return stage.stored[name].read(self._box(stage, name, box))

    def _box(self, stage: StageRun, name: str, box: torch.Tensor) -> torch.Tensor:
        """The parameter as the program keeps it; another program than the trained one may keep it in another layout."""
        own, trained = stage.stored[name], self._stored.get(name)
        if trained is None or trained.cut == own.cut or name not in stage.owned:
            return box
        return own.box(trained.whole(box))

    def _write_buffers(self, stage: StageRun, written: Sequence[tuple[Any, ...]]) -> None:
        """New buffer values, once per step: parts of microbatches summed, others as the first gave them."""
        if not stage.captured.mutations:
            return
        buffers = dict(self.named_buffers())
        with torch.no_grad():
            for k, name in enumerate(stage.captured.mutations):
                values = [outputs[k] for outputs in written]
                summed = len(values) > 1 and stage.summed[k]
                buffers[name].copy_(torch.stack(values).sum(0) if summed else values[0])

    # -- sizes and agreement

    def _agreed(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        training: bool,
        wants: Wants,
        agree: Callable[[Group, Told], list[Told]] = agree,
    ) -> tuple[Runnable, list[Any], dict[sympy.Symbol, int]]:
        """The program for these arguments, their leaves on the device, and the sizes all ranks agreed on."""
        example = normal(args, kwargs)
        leaves, _, shapes = self._agree(example, (training, wants), agree)
        if not leaves and self._may_skip_inputs():
            leaves = [None] * len(self._constants)
            key: tuple[Any, ...] = (training, wants, self._example, self._constants)
        else:
            key = self._key(training, wants, example)

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

    def _may_skip_inputs(self) -> bool:
        """Whether this rank may be called without arguments: its stages read no input."""
        main = next(iter(self._runnables.values()), None)
        return len(self.plan.stages) > 1 and main is not None and not main.reads_inputs

    def _skipped_wrongly(self, everyone: Sequence[Told], key: tuple[Any, ...]) -> bool:
        own = structure_of((*key, self._example, self._constants))
        return any(told.structure == 0 for told in everyone) and any(
            told.structure not in (0, own) for told in everyone
        )

    def _step_sizes(
        self, runnable: Runnable, k: int, bindings: Mapping[sympy.Symbol, int], microbatch: int | None
    ) -> StepSizes:
        """Sizes of a microbatch of a stage; of the whole step for None."""
        total = rows_in(runnable.captured, bindings)
        grid = self._grids[k]
        if microbatch is None or runnable.microbatches == 1:
            rows, microbatch = grid.rows(total), None
        else:
            rows = grid.microbatch(total, microbatch)
        return sizes_of_microbatch(bindings, runnable.symbols, rows, first=not microbatch, microbatch=microbatch)


def _by_last_gradient(program: Program) -> list[int]:
    """The parameters in the order in which a backward pass is done with them: what is read first comes last."""
    first: dict[int, int] = {i: -1 for i, op in enumerate(program.operators) if op.kind == "parameter"}
    for i, op in reversed(list(enumerate(program.operators))):
        first.update({j: i for j, _ in op.operands if j in first})
    return sorted(first, key=lambda j: -first[j])


def _result_dtype(program: Program) -> torch.dtype:
    operator, result = program.operators[-1].operands[0]
    return results(program.nodes[operator])[result].dtype


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


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
