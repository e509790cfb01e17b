"""What became of the degrees that the user's annotations leave open."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from whalepy.planner.degrees import open_scopes
from whalepy.planner.mesh import arrange
from whalepy.program.analysis import Program
from whalepy.runtime.build import Analysed
from whalepy.runtime.pipeline import scopes_in


def open_words(program: Program, stages: Sequence[Analysed]) -> tuple[str, ...]:
    """`replicate 2`, `split 4`: what became of the degrees that annotations leave open."""
    return tuple(_word(line[0].kind, line[0].at, stages) for line in open_scopes(scopes_in(program)))


def _word(kind: str, at: str, stages: Sequence[Analysed]) -> str:
    degrees: set[int] = set()
    for stage in stages:
        mesh = arrange(stage.chains, prod(stage.decisions.mesh))
        for owners in mesh.owners.values():
            own = [n for n, o in zip(mesh.sizes, owners, strict=True) if o is not None and (o.kind, o.at) == (kind, at)]
            degrees.update([prod(own)] if own else [])
    least, most = min(degrees, default=1), max(degrees, default=1)
    return f"{kind} {least}" if least == most else f"{kind} {least} to {most}"
