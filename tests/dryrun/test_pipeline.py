"""A pipeline rehearsed does what its ranks do: the same bytes cross, the same state is kept; its step is theory's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests import pipelines
from tests.models import Made
from tests.pipelines import blocks, staged
from tests.pool import Pool
from whalepy.dryrun.pipeline import PipelineCandidate, PipelineTried
from whalepy.dryrun.rehearse import Rehearsed, rehearse_stages
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.build import Recipe


def gpt2(*bounds: int, wrap: pipelines.Wrap = pipelines.plain, outer: Any = ()) -> dict[str, Any]:
    return staged(blocks("transformer.h.*", bounds), wrap, outer)


def split_after(k: int) -> Any:
    """One device feeds two, which share heads 3:1."""
    return whalepy.stage(1) if k == 0 else [whalepy.stage(2), whalepy.split(2, shares=(3, 1))]


def rows_after(k: int) -> Any:
    """One device feeds two, which share rows 3:1."""
    return whalepy.stage(1) if k == 0 else [whalepy.stage(2), whalepy.replicate(2, shares=(3, 1))]


@dataclass(frozen=True)
class Case:
    """A model in stages on CPUs."""

    make: Callable[[], Made]
    annotations: Callable[[], Mapping[str, Any]]
    world: int
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def model(self) -> tuple[nn.Module, Any]:
        """Annotated, with one batch."""
        model, batches = self.make()
        whalepy.annotate(model, self.annotations())
        return model, batches[0]

    @property
    def spec(self) -> str:
        """The devices."""
        return f"{self.world}xcpu"


CASES = {
    "tied": Case(pipelines.gpt2, lambda: gpt2(0, 2, 4), 2, {"microbatches": 3}),
    "rows inside": Case(pipelines.gpt2, lambda: gpt2(0, 2, 4, wrap=rows_after), 3, {"microbatches": 2}),
    "split inside": Case(pipelines.gpt2, lambda: gpt2(0, 2, 4, wrap=split_after), 3, {"microbatches": 4}),
    "replicas around": Case(
        pipelines.gpt2, lambda: gpt2(0, 1, 4, outer=[whalepy.replicate(shares=(2, 1))]), 4, {"microbatches": 2}
    ),
    "interleaved": Case(
        pipelines.gpt2, lambda: gpt2(0, 1, 2, 3, 4), 2, {"microbatches": 4, "schedule": "interleaved:2"}
    ),
    "zero-bubble": Case(pipelines.gpt2, lambda: gpt2(0, 1, 4), 2, {"microbatches": 3, "schedule": "zero-bubble"}),
    "skips, lent and written": Case(pipelines.skipping, dict[str, Any], 3, {"microbatches": 2}),
    "split at both ends": Case(pipelines.feeding, lambda: pipelines.fed((1, 1), (3, 1)), 4, {"microbatches": 2}),
}


@dataclass(frozen=True)
class Seen:
    """Bytes of one rank: sent over boundaries and within stages in its second step, and what it keeps."""

    crossed: int
    inside: int
    parameters: int
    state: int


def seen(case: Case) -> Seen:
    """What this rank does."""
    model, batch = case.model()
    parallel = whalepy.compile(model, case.spec, batch, **case.options)
    update = torch.optim.AdamW(parallel.parameters())
    own = parallel.local_batch(batch)

    def call() -> Any:
        return parallel.train_step(**own) if isinstance(own, dict) else parallel.train_step(*own)

    call()
    update.step()
    before = _sent(parallel)
    call()
    crossed, inside = (now - was for now, was in zip(_sent(parallel), before, strict=True))
    state = sum(v.nbytes for held in update.state.values() for v in held.values())
    return Seen(crossed, inside, sum(p.nbytes for p in parallel.parameters()), state)


def _sent(parallel: Any) -> tuple[int, int]:
    """Bytes sent so far, over boundaries and within stages."""
    boundaries = [
        boundary
        for runnable in parallel._runnables.values()
        for boundary in (*runnable.values.values(), *runnable.parameters.values())
    ]
    groups = {id(group): group for place in parallel._places.values() for group in place.groups}
    return sum(b.sent_bytes for b in boundaries), sum(group.sent_bytes for group in groups.values())


def tried_of(case: Case, cluster: str = "", **options: Any) -> PipelineTried:
    """The same, planned without devices."""
    model, batch = case.model()
    study = Study.of(Recipe(model), batch, "adamw")
    chosen = Options(**{**case.options, **options})
    return tried_in_stages(study, ClusterSpec.load(cluster or case.spec), chosen, Staged())


def candidate_of(tried: PipelineTried) -> PipelineCandidate:
    assert isinstance(tried.candidate, PipelineCandidate)
    return tried.candidate


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranks_send_and_keep_what_was_foreseen(workers: Pool, case: Case) -> None:
    measured: list[Seen] = workers.run(case.world, seen, case)
    tried = tried_of(case)
    candidate = candidate_of(tried)
    crossed = candidate.crossed_bytes()
    for rank, own in enumerate(measured):
        work = candidate.work(rank, tried.rows_of(rank))
        inside = sum(event.bytes * times for event, times in work.weighted if event.collective)
        sent = sum(size for (source, _), size in crossed.items() if source == rank)
        assert Seen(sent, inside, work.parameters, work.optimizer) == own


def test_a_few_microbatches_stand_for_all() -> None:
    """Put together from three of five microbatches, a step holds and sends what one of all five does."""
    candidate = candidate_of(tried_of(CASES["tied"], microbatches=5))
    assert candidate.stand_ins == (0, 1, 1, 3, 3)  # of 8 rows: 2, 2, 2, 1, 1; the first makes the gradients
    for rank in range(2):
        rehearsed = Rehearsed(candidate.study.recipe, "adamw", fused=False)
        whole = rehearse_stages(
            rehearsed, candidate.pipeline, candidate.plan, rank, candidate.study.example, range(candidate.microbatches)
        )
        held = whole.before
        peaks: list[int] = []
        for (ran, before, act), action in zip(candidate.held(rank), candidate.actions[rank], strict=True):
            assert ran.op == action.op and abs(before - held) <= _NOISE
            held += whole.acts[action].grows
            peaks.append(before + act.peak)
        assert sum(whole.sent.values()) == sum(s for (a, _), s in candidate.crossed_bytes().items() if a == rank)
        assert max(peaks) <= candidate.work(rank, 8).peak


_NOISE = 64
"""Bytes: losses of one number each are kept until the end of the step."""


class Chain(nn.Module):
    """Equal blocks, a stage each."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            with whalepy.stage():
                for _ in range(16):
                    x = torch.tanh(block(x))
        return x.pow(2).sum()


def chain(stages: int, rows: int = 4096) -> Made:
    """On the meta device."""
    with torch.device("meta"):
        return Chain(stages), [(torch.empty(rows, 256, requires_grad=True),)]


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8)])
def test_equal_stages_wait_as_long_as_theory_says(stages: int, microbatches: int) -> None:
    """1F1B: (S - 1) / (M + S - 1) of the step; updates, sends, the loss and the first stage's inputs beside it."""
    tried = tried_of(Case(lambda: chain(stages), dict[str, Any], stages, {"microbatches": microbatches}))
    ends = [track.clock for track in tried.played.tracks]
    busy = [track.busy_s for track in tried.played.tracks]
    theory = (stages - 1) / (microbatches + stages - 1)
    middle = stages // 2 if stages > 2 else 1
    assert tried.step_s == max(ends) >= max(busy)
    assert 1 - busy[middle] / tried.step_s == pytest.approx(theory, rel=0.05)


def test_gpipe_holds_all_microbatches_where_1f1b_holds_as_many_as_stages() -> None:
    case = Case(lambda: chain(2, 8192), dict[str, Any], 2, {"microbatches": 8})
    plain, gpipe = (candidate_of(tried_of(case, schedule=kind)) for kind in ("1f1b", "gpipe"))
    fixed = plain.acts_of(0).before
    activations = [candidate.work(0, 8192).peak - fixed for candidate in (plain, gpipe)]
    assert 3 < activations[1] / activations[0] <= 4  # 8 in flight, not 2
    assert plain.work(1, 8192).peak < gpipe.work(1, 8192).peak + 1


def test_replicas_of_a_stage_keep_the_optimizer_state_in_parts() -> None:
    """ZeRO 1: half the state each; what a reduction sends less, the gather of the parameters sends."""
    plain, parted = (tried_of(CASES["replicas around"], zero=zero) for zero in (0, 1))
    for rank in plain.ranks:
        whole, part = (tried.candidate.work(rank, 0) for tried in (plain, parted))
        assert part.optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)
        saved = whole.optimizer - part.optimizer
        assert candidate_of(plain).acts_of(rank).before - candidate_of(parted).acts_of(rank).before == saved
        assert (part.parameters, part.gradients, part.flops) == (whole.parameters, whole.gradients, whole.flops)
        kinds = {event.collective for event in part.events if event.collective and event.phase != "forward"}
        assert kinds == {"reduce-scatter", "all-gather"}
        sent = [sum(e.bytes * times for e, times in work.weighted if e.collective) for work in (whole, part)]
        assert 0.9 * sent[0] < sent[1] <= sent[0]  # what a stage borrows is put together where it is kept
    assert parted.candidate.savings.words == ("zero 1",)
    assert _out(parted) == pytest.approx(_out(plain), rel=0.1)
    assert parted.step_s == pytest.approx(plain.step_s, rel=0.2)


def _out(tried: PipelineTried) -> tuple[float, float]:
    """Bytes inside nodes and out of them."""
    inside, out = candidate_of(tried).traffic()
    return sum(inside.values()), sum(out.values())


@pytest.mark.parametrize("name", ["split inside", "replicas around"])
def test_a_larger_batch_and_longer_rows_hold_what_they_would_if_asked_for(name: str) -> None:
    case = CASES[name]
    candidate = candidate_of(tried_of(case))
    study = candidate.study
    longer = candidate.with_length(12, 20)
    assert longer is not None and candidate.study.rows == 8
    tall, long = study.with_rows(16), study.with_length(12, 20)
    assert long is not None
    for found, asked in ((candidate.with_rows(16), tall), (longer, long)):
        other = candidate_of(tried_in_stages(asked, candidate.cluster, Options(**case.options), Staged()))
        for rank in candidate.plan.ranks:
            assert found.rows_of(rank) == other.rows_of(rank)
            assert found.work(rank, 0) == other.work(rank, 0)


def test_what_crosses_between_nodes_takes_its_time() -> None:
    case = Case(lambda: chain(2), dict[str, Any], 2, {"microbatches": 4})
    near, far = tried_of(case, "2xT4"), tried_of(case, "2x1xT4 @ 1Gbit/s")
    assert (
        candidate_of(near).crossed_bytes()
        == candidate_of(far).crossed_bytes()
        == {
            (0, 1): 4096 * 256 * 4,
            (1, 0): 4096 * 256 * 4,
        }
    )
    assert far.step_s > near.step_s + 4096 * 256 * 4 / 125e6
    assert far.played.tracks[0].bridge_s > near.played.tracks[0].bridge_s
