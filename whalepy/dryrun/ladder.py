"""One strategy with its microbatches, its rows and its savings of memory: the first that fits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from whalepy.dryrun.degrees import open_words
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.shares import BY_WHALE, chosen_rows, enough_microbatches, equal_rows
from whalepy.dryrun.study import Savings, Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.primitives import Primitive

Strategy = tuple[tuple[Primitive, ...] | None, str, str]
"""Levels, their name, and the flags that force them."""

AS_ANNOTATED: Strategy = None, "as annotated", ""
"""The levels of the user's own."""

LADDER = (
    Savings(0, "selective"),
    Savings(1, "none"),
    Savings(1, "selective"),
    Savings(3, "none"),
    Savings(3, "selective"),
    Savings(0, "full"),
    Savings(3, "full"),
)
"""Ways to save memory, those first that cost the least time on most devices. The last one saves the most."""


def with_savings(
    study: Study, cluster: ClusterSpec, wanted: Sequence[Strategy], options: Options, progress: Progress
) -> list[Tried]:
    """The first rung of the ladder that fits, for the first strategy that fits on the last one: the least split."""
    found: list[Tried] = []
    for strategy in wanted:
        progress(f"{strategy[1]}, {', '.join(LADDER[-1].words)}")
        with suppress(AnnotationError):
            last = in_microbatches(study, cluster, strategy, options, LADDER[-1])
            found += last
            if all(tried.verdict == "no" for tried in last):
                continue
            for savings in LADDER[:-1]:
                progress(f"{strategy[1]}, {', '.join(savings.words)}")
                tried = in_microbatches(study, cluster, strategy, options, savings)
                if any(one.verdict != "no" for one in tried):
                    return [*tried, *found]
            return found
    return found


def in_microbatches(
    study: Study, cluster: ClusterSpec, strategy: Strategy, options: Options, savings: Savings
) -> list[Tried]:
    """The strategy with the best shares, and with equal ones; in microbatches where it does not fit without."""
    found = with_shares(study, cluster, strategy, options, options.microbatches or 1, savings)
    if options.microbatches is None and all(tried.verdict == "no" for tried in found):
        count = min(enough_microbatches(tried) for tried in found)
        most = max(found[0].rows)
        for microbatches in dict.fromkeys((min(count, most), min(2 * count, most))):
            if microbatches == 1 or count > 2 * most:
                continue
            try:
                found += with_shares(study, cluster, strategy, options, microbatches, savings)
            except PlanError:  # the loss is no sum over rows
                return found
            if any(tried.verdict != "no" for tried in found):
                return found
    return found


def with_shares(
    study: Study, cluster: ClusterSpec, strategy: Strategy, options: Options, microbatches: int, savings: Savings
) -> list[Tried]:
    """The strategy in so many microbatches, with the best shares and with equal ones, or with those that are forced."""
    levels, name, flags = strategy
    candidate = study.candidate(levels, cluster, cluster.speeds(), microbatches, savings)
    if levels is None:
        name = ", ".join((name, *open_words(study.program, (candidate.main,))))
    found: list[Tried] = []
    for rows, forces in chosen_rows(candidate, study.rows, options).items():
        shares = _written(rows)
        by = "by Whale " if forces == BY_WHALE else ""
        parts = [name, f"shares {by}{shares}" if len(rows) > 1 else "", *savings.words]
        parts.append(f"{microbatches} microbatches" if microbatches > 1 else "")
        equal = rows == equal_rows(study.rows, candidate.replicas)
        forced = "equal" if equal else ":".join(map(str, rows))
        force = [flags, (forces or f"--shares {forced}") if len(rows) > 1 else "", *savings.flags]
        force.append(f"--microbatches {microbatches}" if microbatches > 1 else "")
        text = " ".join(filter(None, force)) if flags or levels is None else ""  # none force some of the devices
        found.append(Tried(candidate, rows, ", ".join(filter(None, parts)), text, candidate.played(rows)))
    return found


_FEW = 8


def _written(rows: tuple[int, ...]) -> str:
    """`24:24:8:8`; many shares as `4 x 24, 4 x 8`."""
    if len(rows) <= _FEW:
        return ":".join(map(str, rows))
    counts = {each: rows.count(each) for each in rows}
    return ", ".join(f"{count} x {each}" for each, count in counts.items())
