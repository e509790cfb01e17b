"""What stages have in common: one rehearsal serves all ranks that run the same program on parts of the same sizes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from whalepy.dryrun.blocks import Blocks, module_of
from whalepy.planner.plan import StagePlan
from whalepy.planner.schedule.actions import Action
from whalepy.planner.work import Acted, Event, Part, RecordedActions
from whalepy.runtime.build import Analysed

if TYPE_CHECKING:
    from whalepy.dryrun.pipeline import PipelineCandidate


@dataclass(frozen=True)
class StageForm:
    """A stage as others are compared with it."""

    text: Hashable
    """Equal for stages that run the same program; None for one that is like no other."""
    blocks: tuple[int, ...]
    """The numbers of its blocks."""


def form_of(stage: Analysed, placed: StagePlan, blocks: Blocks) -> StageForm:
    """The program of a stage: operators, sizes, levels and shares, without the names of what it reads and makes.

    One that writes buffers, or must know something of the whole batch, is like no other.
    """
    numbers = {node: k for k, node in enumerate(stage.rewritten.graph.graph.nodes)}
    inside = {node: _block_of(node, stage, blocks) for node in numbers}
    own = tuple(sorted({block for block in inside.values() if block >= 0}))
    first = own[0] if own else 0
    if stage.prologue is not None or stage.program.captured.mutations:
        return StageForm(None, own)
    rows = [
        (node.op, "" if node.op == "placeholder" else repr(node.target), _arguments(node, numbers), _value(node),
         inside[node] - first if inside[node] >= 0 else -1)
        for node in numbers
    ]  # fmt: skip
    kept = [_kept(place.kind, place.name, stage) for place in stage.program.captured.placeholders]
    levels = placed.mesh, placed.cuts, placed.row_cuts, placed.outer
    text = repr((rows, kept, [*stage.rewritten.bindings], levels, stage.rewritten.results))
    return StageForm(_NUMBERS.sub("", text), own)


_NUMBERS = re.compile(r"(axis|node)=\d+")
"""Of the axis that is cut, whose size is told beside it, and of the operator that a stream of random numbers is for."""


def _block_of(node: fx.Node, stage: Analysed, blocks: Blocks) -> int:
    """The block that a node lies in; -2 where the capture is silent."""
    value = stage.rewritten.values.get(node.name)
    if value is None:
        return -2
    source = stage.program.nodes[value[0]]
    if source.op == "placeholder":
        return blocks.of(stage.program.placeholder(value[0]).name)
    path = module_of(source)
    return -2 if path is None else blocks.of(path)


def _arguments(node: fx.Node, numbers: Mapping[fx.Node, int]) -> str:
    def number(operand: fx.Node) -> Any:
        return f"%{numbers[operand]}"

    return repr(fx.map_arg((node.args, node.kwargs), number))


def _value(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}"


def _kept(kind: str, name: str, stage: Analysed) -> Hashable:
    """How a placeholder is kept and read."""
    if kind != "parameter":
        return kind
    place = next(p for p in stage.program.captured.placeholders if p.name == name)
    value = place.value
    learns = None if value is None else (tuple(value.shape), str(value.dtype), value.requires_grad)
    return kind, stage.decisions.stored.get(name), stage.decisions.read.get(name), learns


def form_of_rank(candidate: PipelineCandidate, rank: int) -> Hashable:
    """Equal for ranks whose stages run the same programs on parts of the same sizes.

    What is counted of an action is what it adds: how forwards and backwards take turns is of no matter.
    """
    own = candidate.plan.stages_of(rank)
    texts = [(candidate.forms[k].text, candidate.sizes_of(k, candidate.places[k][rank])) for k in own]
    lends = any(k in pair for pair in candidate.pipeline.parameters for k in own)
    if lends or any(text is None for text, _ in texts):
        return candidate.kind_of_rank(rank)
    numbers = {k: place for place, k in enumerate(stages_beside(candidate, rank))}
    run = set(candidate.stand_ins)
    actions = tuple(
        (a.op, numbers[a.stage], a.microbatch, None if a.peer is None else numbers[a.peer])
        for a in sorted(candidate.actions[rank], key=lambda action: action.op)
        if a.microbatch is None or a.microbatch in run
    )
    return tuple(texts), actions, _crossing(candidate, rank, numbers)


def stages_beside(candidate: PipelineCandidate, rank: int) -> list[int]:
    """The stages of a rank, and those that it gives values to or takes them from."""
    own = candidate.plan.stages_of(rank)
    pairs = [*candidate.pipeline.values, *candidate.pipeline.parameters]
    return sorted({*own, *(k for pair in pairs if pair[0] in own or pair[1] in own for k in pair)})


def _crossing(candidate: PipelineCandidate, rank: int, numbers: Mapping[int, int]) -> Hashable:
    """What a rank sends and takes in each microbatch that is run."""
    found: list[Hashable] = []
    own = candidate.plan.stages_of(rank)
    for pair, crossed in candidate.pipeline.values.items():
        if pair[0] not in own and pair[1] not in own:
            continue
        boundary = candidate.boundary(crossed, pair, rank)
        for m in sorted(set(candidate.stand_ins)):
            sizes = candidate.crossing_sizes(pair, m)
            traffic = boundary.traffic(m, lambda sizes=sizes: sizes, sum(sizes[0].rows.values()))
            ways = [way for one in traffic for way in (one.sends, one.receives)]
            each = [sorted((boundary.size_of(parts), to == rank) for to, parts in way.items()) for way in ways]
            found.append((numbers[pair[0]], numbers[pair[1]], m, repr(each)))
        found.append(tuple((c.learns, c.output, c.name) for c in crossed))
    return tuple(found)


def told_of(recorded: RecordedActions, stages: Mapping[int, int], blocks: Mapping[int, int]) -> RecordedActions:
    """The same of other stages and blocks, by number."""

    def named(action: Action) -> Action:
        peer = None if action.peer is None else stages[action.peer]
        return action._replace(stage=stages[action.stage], peer=peer)

    def placed(part: Part) -> Part:
        if isinstance(part, Event) and part.block in blocks:
            return replace(part, block=blocks[part.block])
        return part

    return replace(
        recorded,
        prelude=tuple(replace(event, block=blocks.get(event.block, event.block)) for event in recorded.prelude),
        acts={
            named(action): Acted(tuple(map(placed, acted.parts)), acted.grows, acted.lead)
            for action, acted in recorded.acts.items()
        },
        holdings={
            stages[k]: {blocks.get(block, block): held for block, held in own.items()}
            for k, own in recorded.holdings.items()
        },
        sent={(stages[a], stages[b]): size for (a, b), size in recorded.sent.items()},
    )
