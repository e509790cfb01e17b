"""A model under the user's annotations, tried; degrees that they leave open are played, not only all devices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from whalepy.dryrun.ladder import AS_ANNOTATED, with_shares
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.degrees import Degrees, open_scopes
from whalepy.planner.mesh import arrange
from whalepy.planner.placing import Place
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.primitives import scope_by_id
from whalepy.program.analysis import Program
from whalepy.program.taskgraphs import stages_in
from whalepy.runtime.pipeline import arranged, scopes_in


@dataclass(frozen=True)
class Settled:
    """A model with what is expected to take least, of what its annotations leave open."""

    study: Study
    """With the degrees."""
    best: Tried | None = None
    """None where there was nothing to choose."""
    plain: Tried | None = None
    """With all devices for the degrees that are open; None where that cannot be."""
    by_rule: Tried | None = None
    """With the best degrees, and the microbatches and the schedule of the rule; None without stages."""
    others: tuple[Tried, ...] = ()
    """All else that was played."""


def with_best_degrees(study: Study, cluster: ClusterSpec, options: Options, progress: Progress) -> Settled:
    """The model with the best degrees that are found where its annotations leave them open.

    One line of the user's after the other is given each degree that divides the devices, as the others stand. A split
    that was written down is not given up.
    """
    lines, count = open_scopes(scopes_in(study.program)), len(cluster.devices)
    if not lines or count == 1 or study.degrees:
        return Settled(study)
    seen: set[Hashable] = set()
    found: dict[Degrees, Tried] = {}
    others: list[Tried] = []

    def tried(degrees: Degrees, name: str) -> None:
        with suppress(WhaleError):
            settled = study.settled(degrees if any(degrees) else ())
            if (form := _form(settled, cluster, options)) not in seen:
                seen.add(form)
                progress(name)
                own = _tried(settled, cluster, options)
                others.extend(own)
                found[degrees] = min(own, key=_order)

    plain: Degrees = (None,) * len(lines)
    best = plain
    tried(plain, "as annotated")
    for turn in range(_ROUNDS * len(lines)):
        k, first = turn % len(lines), lines[turn % len(lines)][0]
        for degree in (d for d in range(_LEAST[first.kind], count + 1) if count % d == 0):
            tried((*best[:k], degree, *best[k + 1 :]), f"{first.kind} {degree} ({first.at})")
        fastest = min(found, key=lambda degrees: _order(found[degrees]), default=plain)
        best = fastest if _is_worth_it(found.get(fastest), found.get(best)) else best
    if len(found) < 2 and best == plain:
        return Settled(study)
    chosen = found[best].candidate.study if best != plain else study
    left = sorted((one for one in others if one.candidate.study.degrees != chosen.degrees), key=_order)
    return Settled(chosen, found[best], found.get(plain), None, tuple(left))


_LEAST = {"replicate": 1, "split": 2}
_ROUNDS = 2
"""So often each line is gone through."""
_WORTH_IT = 0.95
"""Other degrees are taken for what they are expected to gain by more than this."""


def _is_worth_it(other: Tried | None, now: Tried | None) -> bool:
    if other is None or now is None or now.verdict == "no":
        return other is not None
    return other.verdict != "no" and other.step_s < _WORTH_IT * now.step_s


def _order(tried: Tried) -> tuple[object, ...]:
    return tried.order


def _tried(study: Study, cluster: ClusterSpec, options: Options) -> list[Tried]:
    if stages_in(study.program):
        return [tried_in_stages(study, cluster, options, Staged())]
    return with_shares(study, cluster, AS_ANNOTATED, options, options.microbatches or 1, options.savings)


def _form(study: Study, cluster: ClusterSpec, options: Options) -> Hashable:
    """Equal for degrees that put the same scopes on the same devices. Raises WhaleError where these cannot be met."""
    places = [Place(device.type, device.node) for device in cluster.devices]
    chunks = parse_kind(options.schedule or DEFAULT).chunks or 1
    made = arranged(
        study.program, cluster.speeds(), places, chunks, idle=False, loads=study.loads, degrees=study.degrees
    )
    chains = [tuple(map(scope_by_id, chain)) for chain in sorted(set(_chains(study.program)))]
    found: list[Hashable] = []
    for k, devices in enumerate(made.devices):
        own = [made.chain(chain) for chain in chains if not made.stages or made.stages[k] in chain]
        mesh = arrange(own, len(devices))
        owners = (tuple("" if p is None else f"{p.kind} {p.at}" for p in mesh.owners[chain]) for chain in own)
        found.append((devices, mesh.sizes, tuple(owners)))
    return tuple(found)


def _chains(program: Program) -> Iterator[tuple[int, ...]]:
    return (op.scope for op in program.operators if op.kind == "call")
