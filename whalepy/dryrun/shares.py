"""Rows per replica: equal, forced, or those with which the slowest ends earliest; and how many microbatches fit."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Literal

from whalepy.dryrun.study import Candidate
from whalepy.dryrun.tried import TIGHT, Options, Tried
from whalepy.errors import PlanError
from whalepy.planner.balance import Curve, balance
from whalepy.planner.shares import round_shares
from whalepy.planner.whale import whale_rows


def enough_microbatches(tried: Tried) -> int:
    """The least power of two at which every device may hold its activations; a very large one where none is enough."""
    needed = 1.0
    for rank in tried.ranks:
        work = tried.candidate.work(rank, tried.rows_of(rank))
        fixed = tried.peak(rank) - work.peak + work.parameters + work.optimizer + work.gradients + work.buffers
        room = TIGHT * tried.capacity(rank) - fixed
        needed = max(needed, (tried.peak(rank) - fixed) / room if room > 0 else 2.0**40)
    return 1 << max(math.ceil(math.log2(needed)), 0)


def equal_rows(total: int, replicas: int) -> tuple[int, ...]:
    """As equal as whole rows come, larger ones first."""
    each, more = divmod(total, replicas)
    return tuple(each + (i < more) for i in range(replicas))


def best_rows(candidate: Candidate, total: int) -> tuple[int, ...]:
    """Rows per replica with the earliest end, with room in the memory of every device; without where that cannot be."""
    replicas = candidate.replicas
    if are_alike(candidate):
        return equal_rows(total, replicas)
    curves = curves_of(candidate, total)
    for limit in (TIGHT, 1.0, float("inf")):
        most = [filled.most_rows(limit, total) for _, filled in curves]
        rows = balance(total, [seconds for seconds, _ in curves], most)
        if rows is not None:
            return rows
    return equal_rows(total, replicas)


def rows_by_rate(candidate: Candidate, total: int) -> tuple[int, ...]:
    """Rows per replica as Whale shares them out: by float32 rates, then by room in the memory of every device."""
    replicas = range(candidate.replicas)
    rates = [sum(candidate.device(rank).rate() for rank in candidate.ranks_of(replica)) for replica in replicas]
    filled = [part for _, part in curves_of(candidate, total)]
    return next(
        (rows for limit in (TIGHT, 1.0) if (rows := whale_rows(total, rates, filled, limit)) is not None),
        round_shares(total, rates),
    )


def chosen_rows(candidate: Candidate, total: int, options: Options) -> dict[tuple[int, ...], str]:
    """The rows per replica that are played, each with the option that forces it where it has no plain shares."""
    equal = equal_rows(total, candidate.replicas)
    if options.shares is not None:
        return {forced_rows(candidate, total, options.shares): ""}
    if options.balance == "equal":
        return {equal: "--balance equal"}
    if options.balance == "whale":
        return {rows_by_rate(candidate, total): BY_WHALE}
    found = {best_rows(candidate, total): "", equal: ""}
    if are_alike(candidate):
        return found
    return {**found, **{rows: BY_WHALE for rows in [rows_by_rate(candidate, total)] if rows not in found}}


BY_WHALE = "--balance whale"


def are_alike(candidate: Candidate) -> bool:
    """Whether every replica does the same on devices of the same kind: equal rows are then best."""
    return len({candidate.kind_of(replica) for replica in range(candidate.replicas)}) == 1


def curves_of(candidate: Candidate, total: int) -> list[tuple[Curve, Curve]]:
    """Per replica and by rows: seconds of its slowest rank, and the largest part of a memory in use."""
    even = max(total // candidate.replicas, 1)
    at = sorted({even, min(even * 2, total)} if even < total else {max(even // 2, 1), even})
    known: dict[Hashable, tuple[Curve, Curve]] = {}
    kinds = [candidate.kind_of(replica) for replica in range(candidate.replicas)]
    for replica, kind in enumerate(kinds):
        if kind not in known:
            known[kind] = candidate.curves(replica, at)
    return [known[kind] for kind in kinds]


def forced_rows(candidate: Candidate, total: int, shares: tuple[float, ...] | Literal["equal"]) -> tuple[int, ...]:
    if shares == "equal":
        return equal_rows(total, candidate.replicas)
    if len(shares) != candidate.replicas:
        raise PlanError(
            f"{len(shares)} shares for {candidate.replicas} replicas", fix="give one weight per replica, such as 3:1"
        )
    return round_shares(total, shares)
