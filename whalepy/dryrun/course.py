"""The course of each rank over a step of a pipeline: what it does when, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whalepy.planner.forecast import Span, SpanKind
from whalepy.planner.schedule.actions import SENDS, Op
from whalepy.planner.schedule.simulate import Simulated, Timed
from whalepy.planner.timeline import Played, RankTrack
from whalepy.planner.work import Rehearsal

if TYPE_CHECKING:
    from whalepy.dryrun.pipeline import PipelineCandidate


@dataclass
class Step:
    """A simulated step, from which the course of each rank follows."""

    candidate: PipelineCandidate
    simulated: Simulated
    exposed_s: float
    """Seconds by which the step is longer because values take time to cross."""

    def played(self) -> Played:
        """The tracks of all ranks."""
        candidate = self.candidate
        tracks = {rank: self._track(rank) for rank in candidate.plan.ranks}
        step = max(track.clock for track in tracks.values())
        return Played(step, tuple(tracks.get(rank, RankTrack()) for rank in range(candidate.plan.devices)))

    def _track(self, rank: int) -> RankTrack:
        candidate, track = self.candidate, RankTrack()
        own = next(own for own in self.simulated.timed if own and own[0].action.stage in self._stages(rank))
        acts, positions = candidate.acts_of(rank), {k: self._position(rank, k) for k in self._stages(rank)}
        held = acts.before
        track.memory.append((0.0, held))
        for timed in own:
            act = acts.acts[candidate.stand_in(timed.action)]
            track.memory += [(timed.start_s, held + act.peak), (timed.end_s, held + act.grows)]
            held += act.grows
            self._add(track, timed, positions)
        track.memory.sort(key=lambda point: point[0])
        track.clock = max(timed.end_s for timed in own)
        track.bridge_s += self.exposed_s
        self._update(track, rank)
        return track

    def _stages(self, rank: int) -> tuple[int, ...]:
        return self.candidate.plan.stages_of(rank)

    def _position(self, rank: int, k: int) -> int:
        """Of a rank among those of a stage, by their numbers."""
        return sorted(self.candidate.plan.stages[k].rank_of).index(rank)

    def _add(self, track: RankTrack, timed: Timed, positions: Mapping[int, int]) -> None:
        action = timed.action
        if action.op in SENDS:
            if timed.end_s > timed.start_s:
                track.beside.append(Span(timed.start_s, timed.end_s, "bridge", str(action)))
        elif action.op in _KINDS:
            played = self.candidate.played_action(self.candidate.stand_in(action))
            own = played.tracks[positions[action.stage]]
            track.busy_s += own.busy_s
            track.waiting_s += own.waiting_s
            track.bridge_s += own.bridge_s
            track.gradient_s += own.gradient_s
            track.gradient_total_s += own.gradient_total_s
            if timed.end_s > timed.start_s:
                track.spans.append(Span(timed.start_s, timed.end_s, _KINDS[action.op], str(action)))

    def _update(self, track: RankTrack, rank: int) -> None:
        cost = self.candidate.cost(rank)
        update = Rehearsal(self.candidate.acts_of(rank).update)
        seconds = sum(cost.seconds(event) * times for event, times in update.weighted)
        if seconds:
            track.spans.append(Span(track.clock, track.clock + seconds, "optimizer", "update"))
            track.memory.append((track.clock, update.peak))
        track.busy_s += seconds
        track.clock += seconds
        for k in self._stages(rank) if self.candidate.savings.zero else ():
            self._gather(track, rank, k)

    def _gather(self, track: RankTrack, rank: int, k: int) -> None:
        """The ranks of a stage end their updates together: what they hold is of one size."""
        own = self.candidate.gathered(k).tracks[self._position(rank, k)]
        if own.clock:
            track.spans.append(Span(track.clock, track.clock + own.clock, "gradient", "all-gather"))
        track.gradient_s += own.gradient_s
        track.gradient_total_s += own.gradient_total_s
        track.clock += own.clock


_KINDS: Mapping[Op, SpanKind] = {
    "F": "forward", "B": "backward", "I": "backward", "W": "backward", "REDUCE": "gradient",
}  # fmt: skip
