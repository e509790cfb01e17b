"""A schedule as text: one lane per group, one column per tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whalepy.planner.schedule.actions import Action, Op, Schedule
from whalepy.planner.schedule.simulate import Timed, simulate

TICKS: Mapping[Op, int] = {"F": 1, "B": 2, "I": 1, "W": 1, "REDUCE": 1}
"""A backward takes about twice a forward: one product for the inputs, one for the weights. Messages take none."""
_CUT = "… "


def drawn(actions: Schedule, width: int = 120, names: Sequence[str] | None = None) -> str:
    """Lanes of a schedule with its communication (`lowered`), at most `width` columns wide.

    `F0` and `B0` where a group hosts one stage, `2F0` where it hosts several, `R` for REDUCE, `-` where an action goes
    on, `.` where a group waits. Ticks in the middle are left out where there are too many: in a long schedule they
    repeat. `names` stand before the lanes; groups and their stages by default.
    """
    ticks = [[each for each in own if each.action.op in TICKS] for own in simulate(actions, _tick).timed]
    stages = [sorted({action.stage for action in own}) for own in actions]
    labels = [[_label(each.action, len(hosted) > 1) for each in own] for own, hosted in zip(ticks, stages, strict=True)]
    column = max((len(label) for own in labels for label in own), default=0) + 1
    length = max((round(each.end_s) for own in ticks for each in own), default=0)
    lanes = [_cells(own, texts, length, column) for own, texts in zip(ticks, labels, strict=True)]
    heads = list(names) if names is not None else [_name(group, hosted) for group, hosted in enumerate(stages)]
    longest = max(map(len, heads), default=0)
    shown = [_shortened(lane, column, width - longest - 2) for lane in lanes]
    return "\n".join(f"{head:<{longest}}  {lane}".rstrip() for head, lane in zip(heads, shown, strict=True))


def _tick(action: Action) -> float:
    return TICKS.get(action.op, 0)


def _label(action: Action, several: bool) -> str:
    op = "R" if action.op == "REDUCE" else action.op
    microbatch = "" if action.microbatch is None else action.microbatch
    return f"{action.stage if several else ''}{op}{microbatch}"


def _name(group: int, stages: Sequence[int]) -> str:
    return f"group {group} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"


def _cells(own: Sequence[Timed], labels: Sequence[str], length: int, column: int) -> list[str]:
    """One text per tick, all of one width."""
    cells = [".".ljust(column)] * length
    for each, label in zip(own, labels, strict=True):
        start, end = round(each.start_s), round(each.end_s)
        text = label.ljust((end - start) * column - 1, "-" if end - start > 1 else " ") + " "
        cells[start:end] = [text[at * column : (at + 1) * column] for at in range(end - start)]
    return cells


def _shortened(cells: Sequence[str], column: int, width: int) -> str:
    if len(cells) * column - 1 <= width:
        return "".join(cells)
    kept = max((width + 1 - len(_CUT)) // column, 2)
    first = (kept + 1) // 2
    return "".join(cells[:first]) + _CUT + "".join(cells[len(cells) - (kept - first) :])
