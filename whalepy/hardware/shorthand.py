"""The one-line form of a cluster: `2x8xA100-SXM4-80GB + 8xT4 @ 100Gbit/s`, read into what a cluster file would say.

Terms `[NODES x] DEVICES x TYPE [* SPEED]` are joined by `+`, with `@ BANDWIDTH` between nodes, per node and direction.
Without `@`, terms without NODES share one node; with `@`, every term is NODES (default 1) nodes of its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from whalepy.errors import ClusterError
from whalepy.hardware.links import parse_bandwidth

_FIGURE = r"[+-]?[\d.,]+"
_TERM = re.compile(rf"(?:(?P<nodes>{_FIGURE})\s*[xX×]\s*)?(?P<count>{_FIGURE})\s*[xX×]\s*(?P<type>[^*]+?)\s*")
_TERM_FIX = "write `[NODES x] DEVICES x TYPE [* SPEED]`, for example 2x8xA100-SXM4-80GB or 2xcpu*0.5"


@dataclass(frozen=True)
class Term:
    """One term: `nodes` is None where the text does not say."""

    nodes: int | None
    count: int
    type: str
    speed: float

    def entry(self) -> dict[str, Any]:
        """The devices of the term, as a cluster file lists them."""
        return {"type": self.type, "count": self.count, "speed": self.speed}


def parse_shorthand(text: str) -> dict[str, Any]:
    """What a cluster file of the same meaning holds. Raises ClusterError naming the term that cannot be read."""
    body, at, bandwidth = text.partition("@")
    terms = parse_terms(body)
    own_node = [term for term in terms if at or term.nodes is not None]
    shared = [term for term in terms if not at and term.nodes is None]
    nodes = [{"count": term.nodes or 1, "devices": [term.entry()]} for term in own_node]
    if shared:
        first = next(i for i, term in enumerate(terms) if term.nodes is None)
        nodes.insert(first, {"count": 1, "devices": [term.entry() for term in shared]})
    return {"nodes": nodes, "link": {"bandwidth": parse_bandwidth(bandwidth)}} if at else {"nodes": nodes}


def parse_terms(text: str) -> tuple[Term, ...]:
    """The terms of `a + b + ...`, in order. Raises ClusterError naming the one that cannot be read."""
    return tuple(_parse_term(term.strip()) for term in text.split("+"))


def _parse_term(text: str) -> Term:
    body, star, speed = text.partition("*")
    match = _TERM.fullmatch(body)
    if not match:
        raise ClusterError(f"cannot read the cluster term {_shown(text)}", fix=_TERM_FIX)
    return Term(
        nodes=None if match["nodes"] is None else _count(match["nodes"], "nodes", text),
        count=_count(match["count"], "devices", text),
        type=match["type"],
        speed=_speed(speed.strip(), text) if star else 1.0,
    )


def _count(figure: str, what: str, term: str) -> int:
    if not figure.isdecimal() or len(figure) > 18 or int(figure) < 1:
        fix = "write a whole number of at least 1, or leave the term out"
        raise ClusterError(f"cluster term {_shown(term)}: {figure[:20]} is not a number of {what}", fix=fix)
    return int(figure)


def _speed(figure: str, term: str) -> float:
    try:
        speed = float(figure)
    except ValueError:
        speed = math.nan
    if not 0 < speed <= 1e6:
        fix = "write a positive figure, relative to the type's own speed: *0.5 is half as fast"
        raise ClusterError(f"cluster term {_shown(term)}: {_shown(figure)} is not a speed", fix=fix)
    return speed


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
