"""Rows and stages as Whale shares them out: by the devices' FLOP rates, then moved for want of memory. A baseline.

Source: Whale (USENIX ATC 2022), section 3.5 and Algorithm 1, from knowledge of the paper. It gives no size of the steps
in which work moves: here, as for all whole rows, one row. What no rate and no memory can tell, such as operators that
are bound by memory, launches and messages, the algorithm does not see; `planner/balance.py` works on seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from whalepy.planner.shares import round_shares


def whale_rows(
    total: int, rates: Sequence[float], filled: Sequence[Callable[[int], float]], limit: float = 1.0
) -> tuple[int, ...] | None:
    """Rows per replica, `total` in all, proportional to `rates`, then moved until no memory is filled beyond `limit`.

    `filled[i](rows)` is the part of a memory that replica i fills, which never falls with more rows. Each step takes a
    row from the replica that is furthest beyond, and gives it to the one with the least rows for its rate that has room
    for one more (then the least filled); ties to the lower replica. None where the rows do not fit.
    """
    rows = list(round_shares(total, rates))
    beyond = {i for i, n in enumerate(rows) if n and filled[i](n) > limit}
    free = [i for i in range(len(rows)) if i not in beyond]
    while beyond and free:
        peak = max(beyond, key=lambda i: (filled[i](rows[i]), -i))
        valley = min(free, key=lambda i: (_load(rows[i], rates[i]), filled[i](rows[i]), i))
        if filled[valley](rows[valley] + 1) > limit:
            free.remove(valley)
            continue
        rows[peak] -= 1
        rows[valley] += 1
        if not rows[peak] or filled[peak](rows[peak]) <= limit:
            beyond.remove(peak)
    return None if beyond else tuple(rows)


def _load(rows: int, rate: float) -> float:
    return rows / rate if rate > 0 else float("inf")


def whale_cut(flops: Sequence[float], rates: Sequence[float]) -> list[int]:
    """How many neighbours each stage takes, one at least, so that FLOPs are as proportional to rates as cuts allow.

    Each cut, one after the other, lies where the FLOPs before it come nearest to their part of the whole; ties to the
    earlier place. Memory is not looked at: that of a stage is known only once it is cut.
    """
    done, parts = [0.0, *accumulate(flops)], [0.0, *accumulate(rates)]
    cuts = [0]
    for k in range(1, len(rates)):
        last = len(flops) - (len(rates) - k)
        wanted = done[-1] * parts[k] / parts[-1]
        cuts.append(min(range(cuts[-1] + 1, last + 1), key=lambda at: (abs(done[at] - wanted), at)))
    bounds = [*cuts, len(flops)]
    return [b - a for a, b in pairwise(bounds)]
