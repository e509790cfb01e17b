"""The programs of all ranks together: every communication has its partners, and no rank waits for ever.

`exchanges.collect` takes the programs apart into what each rank issues, in order; this file only compares the lists, so
that it serves ranks with different programs as well as ranks that share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import networkx as nx

from whalepy.errors import VerificationError
from whalepy.rewrite.exchanges import Exchange

Programs = Mapping[int, Sequence[Exchange]]
"""Per rank, what it issues in one step, in order."""
Instance = tuple[str, bool, frozenset[int]]
"""One communication: the bridge, whether it is its backward, and the ranks that take part."""
Members = dict[int, Exchange]
"""One communication as each rank that takes part issues it."""

_FIX = "this is a defect of whalepy, not of the model: please report it with str(plan.program(rank)) of these ranks"


def verify(programs: Programs) -> None:
    """Check the programs of all ranks before any group is opened.

    Every communication is issued by all ranks of its group and by no other, even by ranks that hold no element of it;
    they agree on kind, dtype and on what each sends to each; the communications of all ranks can be put into one order
    that agrees with the order of every rank; and every backward runs against the order of its forward.
    Raises VerificationError: the first finding, in the order above.
    """
    instances = _instances(programs)
    for members in instances.values():
        _check_present(members, programs)
    for members in instances.values():
        _check_alike(members)
        _check_sizes(members)
    _check_acyclic(programs)
    for rank, issued in programs.items():
        _check_directions(rank, issued)


def _instances(programs: Programs) -> dict[Instance, Members]:
    found: dict[Instance, Members] = {}
    for rank, issued in programs.items():
        for exchange in issued:
            if rank not in exchange.group:
                raise _error(
                    exchange, f"rank {rank} issues {_text(exchange)} but is not in its group {_ranks(exchange)}"
                )
            members = found.setdefault(_instance(exchange), {})
            if rank in members:
                raise _error(exchange, f"rank {rank} issues {_text(exchange)} twice")
            members[rank] = exchange
    return found


def _instance(exchange: Exchange) -> Instance:
    return exchange.bridge, exchange.backward, frozenset(exchange.group)


def _check_present(members: Members, programs: Programs) -> None:
    one = next(iter(members.values()))
    for rank in one.group:
        if rank in members:
            continue
        for other in programs.get(rank, ()):
            if (other.bridge, other.backward) == (one.bridge, one.backward):
                raise _error(
                    one,
                    f"{_text(one)} joins {_ranks(one)} for rank {min(members)}, but {_ranks(other)} for rank {rank}",
                )
        raise _error(one, f"{_text(one)} joins {_ranks(one)}, but rank {rank} never issues it")


def _check_alike(members: Members) -> None:
    ranks = sorted(members)
    for rank, other in pairwise(ranks):
        a, b = members[rank], members[other]
        for what, mine, theirs in (
            ("level", a.level, b.level),
            ("collective", a.kind, b.kind),
            ("dtype", a.dtype, b.dtype),
            ("order of ranks", a.group, b.group),
        ):
            if mine != theirs:
                raise _error(a, f"{_text(a)} has {what} {mine} on rank {rank}, but {theirs} on rank {other}")


def _check_sizes(members: Members) -> None:
    for rank, sender in members.items():
        for position, other in enumerate(sender.group):
            receiver = members[other]
            sent = sender.sends[position] if sender.sends else None
            expected = receiver.receives[sender.group.index(rank)] if receiver.receives else None
            if sent != expected:
                raise _error(
                    sender,
                    f"in {_text(sender)} rank {rank} sends {sent} elements to rank {other}, which expects {expected}",
                )


def _check_acyclic(programs: Programs) -> None:
    """The union of all orders has no cycle: then the ranks can issue their communications in one common order."""
    before: nx.DiGraph = nx.DiGraph()
    for rank, issued in programs.items():
        for one, other in pairwise(issued):
            before.add_edge(_instance(one), _instance(other), rank=rank, texts=(one, other))
    if nx.is_directed_acyclic_graph(before):
        return
    edges = [before.edges[edge[:2]] for edge in nx.find_cycle(before)]
    waits = [f"rank {e['rank']} issues {_text(e['texts'][0])} before {_text(e['texts'][1])}" for e in edges]
    raise _error(edges[0]["texts"][0], "the ranks would wait for each other: " + "; ".join(waits))


def _check_directions(rank: int, issued: Sequence[Exchange]) -> None:
    """Forward in the order of the rank's program, backward in exactly the reverse."""
    for backward in (False, True):
        same = [exchange for exchange in issued if exchange.backward is backward]
        for first, second in _against(same, backward):
            raise _error(
                second,
                f"rank {rank} issues {_text(first)} before {_text(second)}, "
                f"but the {first.direction} of its program comes to them the other way round",
            )


def _against(exchanges: Sequence[Exchange], backward: bool) -> Iterator[tuple[Exchange, Exchange]]:
    """Neighbours that stand against the order of the program."""
    for first, second in pairwise(exchanges):
        earlier, later = (second, first) if backward else (first, second)
        if earlier.position > later.position:
            yield first, second


def _text(exchange: Exchange) -> str:
    return f"the {exchange.direction} {exchange.kind} of {exchange.bridge} (level {exchange.level})"


def _ranks(exchange: Exchange) -> str:
    return f"ranks {', '.join(map(str, exchange.group))}"


def _error(exchange: Exchange, what: str) -> VerificationError:
    return VerificationError(what, at=exchange.at or None, fix=_FIX)
