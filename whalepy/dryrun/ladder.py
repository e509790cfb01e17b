"""One strategy with its microbatches, its rows and its savings of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
) -> Iterator[list[Tried]]:
    """By rung of the ladder, what was tried on it: strategies up to the first that fits, which splits least.

    Rungs on which nothing fits are left out, but for the last one, which comes at the end.
    """

    def on(strategy: Strategy, savings: Savings) -> list[Tried]:
        progress(f"{strategy[1]}, {', '.join(savings.words)}")
        with suppress(AnnotationError):
            return in_microbatches(study, cluster, strategy, options, savings)
        return []

    last, left = list[Tried](), list(wanted)
    while left:
        last += on(left[0], LADDER[-1])
        if fits(last):
            break
        del left[0]  # it fits on no other rung either
    for savings in LADDER[:-1]:
        found: list[Tried] = []
        for strategy in left:
            found += on(strategy, savings)
            if fits(found):
                yield found
                break
    yield last


def fits(tried: Iterable[Tried]) -> bool:
    """Whether one of them does."""
    return any(one.verdict != "no" for one in tried)


def in_microbatches(
    study: Study, cluster: ClusterSpec, strategy: Strategy, options: Options, savings: Savings
) -> list[Tried]:
    """The strategy with the best shares, and with equal ones; in microbatches where it does not fit without."""
    found = with_shares(study, cluster, strategy, options, options.microbatches or 1, savings)
    if options.microbatches is None and not fits(found):
        count = min(enough_microbatches(tried) for tried in found)
        most = max(found[0].rows)
        for microbatches in dict.fromkeys((min(count, most), min(2 * count, most))):
            if microbatches == 1 or count > 2 * most:
                continue
            try:
                found += with_shares(study, cluster, strategy, options, microbatches, savings)
            except PlanError:  # the loss is no sum over rows
                return found
            if fits(found):
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
