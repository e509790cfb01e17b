"""One rank's training step on the meta device: the very code that trains, with groups that send nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental import _config
from torch.utils import _pytree as pytree

from whalepy.dryrun.blocks import NO_BLOCKS, Blocks, module_of
from whalepy.dryrun.counting import Counter, mark
from whalepy.dryrun.gathered import Gathered
from whalepy.dryrun.model import META, Mark, RehearsedModel
from whalepy.dryrun.recompute import Recompute, attention_of, with_regions
from whalepy.errors import PlanError
from whalepy.planner.placing import Arrangement
from whalepy.planner.plan import Plan
from whalepy.planner.work import Acted, Event, Holdings, Recorded, RecordedActions
from whalepy.program.analysis import Program
from whalepy.rewrite.deferring import Deferred
from whalepy.rewrite.kernels import Seeded, attention, bridge
from whalepy.rewrite.rewrite import Rewritten
from whalepy.runtime.arguments import Arguments, as_arguments, leaf_names, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe
from whalepy.runtime.pipeline import Pipeline
from whalepy.runtime.rows import local_rows

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
}
"""Optimizers whose state is known, with torch's defaults."""


@dataclass(frozen=True)
class Rehearsed:
    """What is rehearsed: a model, how it is optimized, and how it saves memory."""

    recipe: Recipe
    optimizer: str
    blocks: Blocks = NO_BLOCKS
    recompute: Recompute = "none"
    master: bool = False
    """Whether parameters are kept in float32 and read in the type of the model."""
    regathers: bool = False
    """Whether a value that is gathered from parts is kept as this rank's part, and gathered again (Megatron-LM)."""
    fused: bool = True
    """Whether dropout keeps a mask of bytes and the optimizer updates all parameters at once, as torch does on GPUs."""


def rehearse(rehearsed: Rehearsed, main: Analysed, plan: Plan, rank: int, example: Any) -> Recorded:
    """What `rank` does in a step on the global batch `example`, of which only shapes matter.

    Raises PlanError for an operator whose result depends on values.
    """
    devices = tuple(range(len(plan.rank_of)))
    pipeline = Pipeline((main,), Arrangement((), (devices,), {}, 1), {}, {}, {})
    plan = replace(plan, devices=len(devices))
    ran = _ran(rehearsed, pipeline, plan, rank, example, None)
    *starts, reduction = (mark.start for mark in ran.marks if mark.action.op in ("F", "REDUCE"))
    ends = [*starts[1:], reduction]
    return Recorded(
        ran.events[: starts[0]],
        tuple(ran.events[a:b] for a, b in zip(starts, ends, strict=True)),
        ran.events[reduction : ran.updates],
        ran.events[ran.updates :],
        ran.holdings[0],
        ran.buffers,
        ran.inputs,
        rehearsed.fused,
    )


def rehearse_stages(
    rehearsed: Rehearsed, main: Pipeline, plan: Plan, rank: int, example: Any, only: Collection[int]
) -> RecordedActions:
    """What `rank` does in each action of a step of a pipeline, of which only some microbatches are run.

    Raises PlanError for an operator whose result depends on values.
    """
    ran = _ran(rehearsed, main, plan, rank, example, only)
    first, last = ran.marks[0], ran.marks[-1]
    firsts = {mark.action.stage: mark.action for mark in reversed(ran.marks) if mark.action.op == "F"}
    acts = {
        mark.action: Acted(
            tuple(
                replace(event, memory=event.memory - mark.before, peak=event.peak - mark.before)
                for event in ran.events[mark.start : mark.stop]
            ),
            mark.after - mark.before,
            max(ran.reads.get(mark.action.stage, 0) - mark.start, 0) if mark.action == firsts[mark.action.stage] else 0,
        )
        for mark in ran.marks
    }
    return RecordedActions(
        ran.events[: first.start],
        first.before,
        acts,
        ran.events[last.stop :],
        ran.holdings,
        ran.buffers,
        ran.inputs,
        ran.sent,
        rehearsed.fused,
        ran.borrowed,
    )


@dataclass(frozen=True)
class _Ran:
    """A step as it ran: its events, and where its actions and the update are among them."""

    events: tuple[Event, ...]
    marks: Sequence[Mark]
    updates: int
    """Where the events of the update begin."""
    reads: Mapping[int, int]
    """By stage, where the events end that make the tensors that it reads."""
    holdings: Mapping[int, Mapping[int, Holdings]]
    """By stage, then by block."""
    buffers: int
    inputs: int
    sent: Mapping[tuple[int, int], int]
    """Bytes sent to other ranks, by the stages that they cross between."""
    borrowed: Mapping[int, int]
    """By stage, bytes of gradients that it reduces for other stages."""


def _ran(
    rehearsed: Rehearsed, main: Pipeline, plan: Plan, rank: int, example: Any, only: Collection[int] | None
) -> _Ran:
    """One step of a rank, of all microbatches or of those in `only`."""
    counter = Counter()
    gathered = Gathered(counter) if rehearsed.regathers else None
    arguments = _on_meta(as_arguments(example))
    counted = replace(main, stages=tuple(_counted(rehearsed, stage, counter, gathered) for stage in main.stages))
    model = RehearsedModel(rehearsed.recipe, counted, plan, rank, counter, rehearsed.blocks, master=rehearsed.master)
    model.only = only
    model.whole_shapes = leaf_shapes(arguments)
    model.start(arguments)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = OPTIMIZERS[rehearsed.optimizer](trained or list(model.parameters()), foreach=rehearsed.fused)
    args, kwargs = _on_meta(local_rows(arguments, _dims(model, arguments), model._row_pieces))
    with counter, gathered.hooks() if gathered else nullcontext():
        for value in chain(model.parameters(), model.buffers()):
            counter.hold(value.data)
        buffers = _bytes(model.buffers())
        held = _bytes(leaf for leaf in pytree.tree_leaves((args, kwargs)))
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                counter.hold(value)
        _make_state(update, trained)
        for state in update.state.values():  # some is made with the optimizer, ahead of the first step
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    counter.hold(value)
        counter.begin()
        updates = _step(model, update, args, kwargs, counter)
    holdings = _holdings(model, update, rehearsed.blocks)
    sent, borrowed = model.sent_bytes, model.borrowed_bytes
    return _Ran(tuple(counter.events), model.marks, updates, model.reads, holdings, buffers, held, sent, borrowed)


def _make_state(update: torch.optim.Optimizer, trained: Sequence[nn.Parameter]) -> None:
    """Make the optimizer's state, as a first step does."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    update.step()
    update.zero_grad()


def _holdings(model: RehearsedModel, update: torch.optim.Optimizer, blocks: Blocks) -> dict[int, dict[int, Holdings]]:
    """What the parameters of each block of each stage take."""
    stages: dict[int, dict[int, Holdings]] = {k: {} for k in model.plan.stages_of(model.rank)}
    for name, parameter in model.named_parameters():
        block, trained = blocks.of(name), parameter.requires_grad
        copies = model.copies.get(name, 0)
        state = _bytes(update.state.get(parameter, {}).values())
        first = (copies or parameter.nbytes) if trained else 0
        apart = first if model.in_parts(name) else 0
        own = Holdings(parameter.nbytes, copies, first, parameter.nbytes if trained else 0, state, apart)
        found = stages[model.stage_of(name)]
        found[block] = found.get(block, Holdings()) + own
    return stages


class NoRows(PlanError):
    """The model divides by its number of rows, of which there are none."""


def _step(model: RehearsedModel, update: torch.optim.Optimizer, args: Any, kwargs: Any, counter: Counter) -> int:
    """One step; where the events of the update begin."""
    counter.block, counter.quadratic = -1, False
    try:
        with _all_conditions_hold():
            model.train_step(*args, **kwargs)
    except ZeroDivisionError as error:
        raise NoRows(
            "the step cannot be rehearsed: the model divides by the number of rows, and a microbatch has none",
            fix="give fewer microbatches, or a larger global batch",
        ) from error
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise PlanError(
            f"the step cannot be rehearsed: {str(error).splitlines()[0]}",
            fix="the model has an operator whose result depends on values; plan on the machine itself, with compile",
        ) from error
    begins = len(counter.events)
    with counter.during("optimizer"):
        counter.name = ""
        update.step()
        update.zero_grad()
    return begins


def _all_conditions_hold() -> Any:
    """What a condition counts is the most that it can be: its values are not there."""
    return _config.patch(meta_nonzero_assume_all_nonzero=True)  # pyright: ignore[reportAttributeAccessIssue]


def _dims(model: RehearsedModel, arguments: Arguments) -> tuple[int | None, ...]:
    leaves = pytree.tree_leaves(arguments)
    return tuple(model._row_dim(name, leaf) for name, leaf in zip(leaf_names(arguments), leaves, strict=True))


def _bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _on_meta(arguments: Arguments) -> Arguments:
    def moved(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=META) if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(moved, arguments)


def _counted(rehearsed: Rehearsed, main: Analysed, counter: Counter, gathered: Gathered | None) -> Analysed:
    """The same program in graphs whose operators tell the counter their names, attention as it runs fused."""
    graph = _named(main.rewritten, main.program, rehearsed, counter, gathered)
    made = replace(main, rewritten=replace(main.rewritten, graph=graph))
    if main.prologue is None:
        return made
    ahead = main.prologue
    plain = _named(ahead.rewritten, ahead.program, replace(rehearsed, recompute="none"), counter, None)
    return replace(made, prologue=replace(ahead, rewritten=replace(ahead.rewritten, graph=plain)))


def _named(
    rewritten: Rewritten, program: Program, rehearsed: Rehearsed, counter: Counter, gathered: Gathered | None
) -> fx.GraphModule:
    module = rewritten.graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    block_of: dict[fx.Node, int] = {}
    quadratics: set[fx.Node] = set()
    for before, node in copies.items():
        if node.op != "call_function":
            continue
        name = str(node.meta.get("where") or node.name)
        value = rewritten.values.get(before.name)
        path = None if value is None else module_of(program.nodes[value[0]])
        block = None if path is None else rehearsed.blocks.of(path)
        quadratic = value is not None and _is_quadratic(program, value)
        if block is not None:
            block_of[node] = block
        if quadratic:
            quadratics.add(node)
        target = _FUSED.get(node.target, node.target)
        target = _FUSED_ON_GPUS.get(target, target) if rehearsed.fused else target
        if isinstance(target, Deferred):
            form: Any = _Told(target.form, name, -1 if block is None else block, counter)
            target = replace(target, form=form)
        gathers = gathered if target is bridge else None
        node.target = _Named(target, name, block, quadratic, counter, gathers)
    if rehearsed.recompute == "attention":
        block_of = attention_of(block_of, quadratics)
    copied = fx.GraphModule(module, graph)
    return copied if rehearsed.recompute == "none" else with_regions(copied, block_of, rehearsed.recompute, counter)


def _is_quadratic(program: Program, value: tuple[int, int]) -> bool:
    """Whether one axis stands in two dims of the value, as in attention scores."""
    axes = [set(program.axes.leaves(dim)) for dim in program.dims[value[0]][value[1]]]
    return any(a & b for k, a in enumerate(axes) for b in axes[k + 1 :])


@dataclass(frozen=True, eq=False)
class _Named:
    """An operator that tells the counter its name and its block, forward and backward."""

    target: Callable[..., Any]
    name: str
    block: int | None
    """None: that of the operators before."""
    quadratic: bool
    counter: Counter
    gathered: Gathered | None = None

    @property
    def __name__(self) -> str:
        return "named"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        counter = self.counter
        counter.name, counter.quadratic = self.name, self.quadratic
        if self.block is not None:
            counter.block = self.block
        result = self.target(*args, **kwargs)
        if self.gathered is not None and result.numel() > args[0].numel():
            self.gathered.note(result, args[0], args[1])
        mark(result, self.name, counter.block)
        return result


@dataclass(frozen=True, eq=False)
class _Told:
    """How a deferred operator is differentiated; later than the backward pass it tells the counter where it belongs."""

    form: Any
    name: str
    block: int
    counter: Counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.form, name)

    def of_weights(self, *args: Any) -> Any:
        """The gradients of weight and bias."""
        self.counter.belated(self.name, self.block)
        return self.form.of_weights(*args)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as the fused kernels run it: without the scores in memory. On meta, torch would take the plain one."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    lead = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) if x.ndim != 4 else x for x in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0.0)
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return result.reshape(*lead, *result.shape[1:]) if len(lead) != 1 else result


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_FUSED: dict[Any, Any] = {
    **dict.fromkeys((_ATTENTION, attention), fused_attention),
    **dict.fromkeys((Seeded(_ATTENTION), Seeded(attention)), Seeded(fused_attention)),
}


def fused_dropout(value: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Dropout as it runs on GPUs: with a mask of one byte per element."""
    return torch.ops.aten.native_dropout(value, p, train)[0]


_DROPOUT = torch.ops.aten.dropout.default
_FUSED_ON_GPUS: dict[Any, Any] = {_DROPOUT: fused_dropout, Seeded(_DROPOUT): Seeded(fused_dropout)}
