"""One rank's training step on the meta device: the very code that trains, with groups that send nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from whalepy.dryrun.counting import Counter, mark
from whalepy.dryrun.silent import SilentGroup
from whalepy.errors import PlanError
from whalepy.planner.plan import Plan
from whalepy.planner.work import Rehearsal
from whalepy.rewrite.kernels import Seeded, attention
from whalepy.runtime.arguments import Arguments, Shape, as_arguments, leaf_names, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe
from whalepy.runtime.captured import CapturedModel, Runnable
from whalepy.runtime.extents import Grid
from whalepy.runtime.norms import Placement
from whalepy.runtime.rows import local_rows

META = torch.device("meta")
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
}
"""Optimizers whose state is known, with torch's defaults."""


class RehearsedModel(CapturedModel):
    """The compiled model of one rank without the other ranks."""

    def __init__(self, recipe: Recipe, main: Analysed, plan: Plan, rank: int, counter: Counter) -> None:
        world = len(plan.rank_of)
        super().__init__(recipe, META, SilentGroup(-1, world, rank, None), lambda _: (plan, main))
        self._counter = counter

    def _take_place(self, plan: Plan) -> None:
        self._plan = plan
        coordinates = plan.coordinates_of(self._host.position)
        groups = tuple(
            SilentGroup(level, size, at, self._counter)
            for level, (size, at) in enumerate(zip(plan.mesh, coordinates, strict=True))
        )
        self._placement = Placement(META, self._host, groups, coordinates)
        self._grid = Grid(plan.mesh, plan.cuts, plan.row_cuts)

    def _store_parameters(self) -> None:
        model = self._recipe.model
        for name, value in chain(model.named_parameters(), model.named_buffers()):
            entry = self._stored.get(name)
            whole = torch.empty_like(value, device=META)
            box = whole if entry is None else entry.box(whole)
            box = torch.empty(box.shape, dtype=box.dtype, device=META)
            self._attach(name, nn.Parameter(box, value.requires_grad) if isinstance(value, nn.Parameter) else box)

    def _agree(self, example: Arguments, key: tuple[Any, ...]) -> tuple[list[Any], tuple[int | None, ...], list[Shape]]:
        """The shapes of the whole step are the example's."""
        leaves = pytree.tree_leaves(example)
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(leaf_names(example), leaves, strict=True))
        return leaves, dims, self.whole_shapes

    def _reduce_gradients(
        self, runnable: Runnable, read: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        with self._counter.during("gradient"):
            super()._reduce_gradients(runnable, read, parameters)

    whole_shapes: list[Shape]


def rehearse(
    recipe: Recipe, main: Analysed, plan: Plan, rank: int, example: Any, optimizer: str, *, foreach: bool
) -> Rehearsal:
    """What `rank` does in a step on the global batch `example`, of which only shapes matter.

    `foreach`: the optimizer updates all parameters at once, as torch does on GPUs.

    Raises PlanError for an operator whose result depends on values.
    """
    counter = Counter()
    arguments = _on_meta(as_arguments(example))
    model = RehearsedModel(recipe, _counted(main, counter), plan, rank, counter)
    model.whole_shapes = leaf_shapes(arguments)
    model.start(arguments)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = OPTIMIZERS[optimizer](trained, foreach=foreach)
    args, kwargs = _on_meta(local_rows(arguments, _dims(model, arguments), model._grid, model._placement.coordinates))
    with counter:
        for value in chain(model.parameters(), model.buffers()):
            counter.hold(value.data)
        parameters, buffers = _bytes(model.parameters()), _bytes(model.buffers())
        held = _bytes(leaf for leaf in pytree.tree_leaves((args, kwargs)))
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                counter.hold(value)
        _step(model, update, args, kwargs, counter)
        counter.events.clear()
        _step(model, update, args, kwargs, counter)
    gradients = _bytes(p for p in trained)
    state = _bytes(value for entry in update.state.values() for value in entry.values())
    return Rehearsal(tuple(counter.events), parameters, buffers, gradients, state, held)


def _step(model: RehearsedModel, update: torch.optim.Optimizer, args: Any, kwargs: Any, counter: Counter) -> None:
    try:
        model.train_step(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise PlanError(
            f"the step cannot be rehearsed: {str(error).splitlines()[0]}",
            fix="the model has an operator whose result depends on values; plan on the machine itself, with compile",
        ) from error
    with counter.during("optimizer"):
        counter.name = ""
        update.step()
        update.zero_grad()


def _dims(model: RehearsedModel, arguments: Arguments) -> tuple[int | None, ...]:
    leaves = pytree.tree_leaves(arguments)
    return tuple(model._row_dim(name, leaf) for name, leaf in zip(leaf_names(arguments), leaves, strict=True))


def _bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _on_meta(arguments: Arguments) -> Arguments:
    def moved(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=META) if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(moved, arguments)


def _counted(main: Analysed, counter: Counter) -> Analysed:
    """The same program in graphs whose operators tell the counter their names, attention as it runs fused."""
    rewritten = replace(main.rewritten, graph=_named(main.rewritten.graph, counter))
    if main.prologue is None:
        return replace(main, rewritten=rewritten)
    program, decisions, ahead = main.prologue
    prologue = program, decisions, replace(ahead, graph=_named(ahead.graph, counter))
    return replace(main, rewritten=rewritten, prologue=prologue)


def _named(module: fx.GraphModule, counter: Counter) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = fx.GraphModule(module, graph)
    for node in copied.graph.nodes:
        if node.op == "call_function":
            name = str(node.meta.get("where") or node.name)
            node.target = _Named(_FUSED.get(node.target, node.target), name, counter)
    copied.recompile()
    return copied


@dataclass(frozen=True, eq=False)
class _Named:
    """An operator that tells the counter its name, forward and backward."""

    target: Callable[..., Any]
    name: str
    counter: Counter

    @property
    def __name__(self) -> str:
        return "named"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.counter.name = self.name
        result = self.target(*args, **kwargs)
        mark(result, self.name)
        return result


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
