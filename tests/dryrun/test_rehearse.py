"""A rehearsal does what the ranks do: the same exchanges with the same bytes, and the memory that tensors take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import whalepy
from tests.pool import Pool
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.study import Candidate, Study
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.work import Event
from whalepy.runtime.build import Recipe

ROWS, WIDTH, HIDDEN = 12, 16, 48


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.down(self.up(x).relu()), target)


class Tied(Mlp):
    """Reads a parameter twice, and normalises over the hidden units."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.up(x).softmax(-1)
        return F.mse_loss(self.down(h), target) + (h @ self.up.weight).pow(2).mean()


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(ROWS, WIDTH), "target": torch.randn(ROWS, WIDTH)}


SCOPES: dict[str, tuple[int, Callable[[], Any]]] = {
    "replicate": (2, lambda: {"": whalepy.replicate(2, shares=[2, 1])}),
    "split": (2, lambda: {"": whalepy.split(2, shares=[2, 1])}),
    "replicate > split": (4, lambda: {"": [whalepy.replicate(2), whalepy.split(2)]}),
    "siblings": (2, lambda: {"up": whalepy.replicate(2), "down": whalepy.split(2)}),
}


def annotated(kind: type[nn.Module], scopes: str) -> nn.Module:
    model = kind()
    whalepy.annotate(model, SCOPES[scopes][1]())
    return model


def sent_bytes(kind: type[nn.Module], scopes: str) -> list[int]:
    """What this rank sends on each level in its second step."""
    parallel = whalepy.compile(annotated(kind, scopes), f"{SCOPES[scopes][0]}xcpu", batch())
    own = parallel.local_batch(batch())
    parallel.train_step(**own)
    groups = parallel._places[0].groups
    before = [group.sent_bytes for group in groups]
    parallel.train_step(**own)
    return [group.sent_bytes - was for group, was in zip(groups, before, strict=True)]


def candidate_of(kind: type[nn.Module], scopes: str, optimizer: str = "adamw") -> Candidate:
    cluster = ClusterSpec.load(f"{SCOPES[scopes][0]}xcpu")
    study = Study.of(Recipe(annotated(kind, scopes)), batch(), optimizer)
    return study.candidate(None, cluster, cluster.speeds(), 1)


def own_rows(candidate: Candidate, scopes: str, rank: int) -> int:
    if candidate.replicas == 1:
        return ROWS
    return (8, 4)[rank] if scopes == "replicate" else ROWS // 2


@pytest.mark.parametrize("kind", [Mlp, Tied])
@pytest.mark.parametrize("scopes", SCOPES)
def test_the_bytes_of_every_level_are_those_that_ranks_send(workers: Pool, kind: type[nn.Module], scopes: str) -> None:
    measured = workers.run(SCOPES[scopes][0], sent_bytes, kind, scopes)
    candidate = candidate_of(kind, scopes)
    for rank, sent in enumerate(measured):
        events = candidate.work(rank, own_rows(candidate, scopes, rank)).events
        rehearsed = [sum(e.bytes for e in events if e.level == level) for level in range(len(sent))]
        assert rehearsed == sent


def test_memory_is_that_of_the_tensors() -> None:
    work = candidate_of(Mlp, "replicate").work(0, 8)
    parameters = 4 * (2 * WIDTH * HIDDEN + WIDTH + HIDDEN)
    assert (work.parameters, work.gradients, work.inputs) == (parameters, parameters, 2 * 4 * 8 * WIDTH)
    assert work.optimizer == 2 * parameters + 4 * 4  # two moments, and a step count per parameter
    fixed = work.parameters + work.optimizer + work.inputs
    first, last = work.events[0], work.events[-1]
    assert first.memory - fixed in range(4 * 8 * HIDDEN + 64)
    assert work.peak >= fixed + work.gradients and last.memory <= work.peak


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.of(Recipe(annotated(Mlp, "replicate")), batch(), "sgd")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cluster", ["2xcpu", "2xT4"])
def test_an_optimizer_begins_in_place(study: Study, optimizer: str, cluster: str) -> None:
    """What the first operator of an update leaves is what was held before: the whole model's update rests on it."""
    spec = ClusterSpec.load(cluster)
    work = replace(study, optimizer=optimizer, cuts={}).candidate(None, spec, spec.speeds()).work(0, 8)
    first = next(event for event in work.events if event.phase == "optimizer")
    held = work.parameters + work.gradients + work.optimizer + work.inputs
    assert 0 <= first.memory - held <= 64


def test_products_are_counted_forward_and_backward() -> None:
    work = candidate_of(Mlp, "replicate").work(0, 8)
    forward = 2 * 2 * 8 * WIDTH * HIDDEN
    by_phase = {phase: sum(e.flops for e in work.events if e.phase == phase) for phase in ("forward", "backward")}
    # The first layer needs no gradient of its input.
    assert by_phase == {"forward": forward, "backward": 2 * forward - forward // 2}


def test_activations_grow_with_rows_and_parameters_do_not() -> None:
    candidate = candidate_of(Mlp, "replicate", "sgd")
    small, large = candidate.work(0, 100), candidate.work(0, 200)
    assert small.parameters == large.parameters and small.optimizer == large.optimizer == 0
    assert 1.7 < (large.peak - large.parameters) / (small.peak - small.parameters) <= 2


def test_the_phases_follow_one_another() -> None:
    events = candidate_of(Mlp, "replicate > split").work(3, 6).events
    order = list(dict.fromkeys(event.phase for event in events))
    assert order == ["forward", "backward", "gradient", "optimizer"]


def test_an_operator_is_named_by_its_line_forward_and_backward() -> None:
    def products(event: Event) -> bool:
        return event.flops > 0

    events = list(filter(products, candidate_of(Mlp, "replicate").work(0, 8).events))
    assert {event.name for event in events} == {events[0].name}
    assert events[0].name.startswith("test_rehearse.py:")


class Picking(Mlp):
    """Works on the rows that a condition names."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kept = x[:, 0] > 0
        return F.mse_loss(self.down(self.up(x[kept]).relu()), target[kept], reduction="sum") / target.numel()


class Keeping(Mlp):
    """Works on all of them."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.down(self.up(x).relu()), target, reduction="sum") / target.numel()


def test_rows_that_a_condition_names_are_all_rows() -> None:
    """Each of the two ranks works on those of both."""
    picked, kept = (candidate_of(kind, "replicate").work(0, rows) for kind, rows in ((Picking, 4), (Keeping, 8)))
    assert sum(e.flops for e in picked.events) == sum(e.flops for e in kept.events) > 0


class Reading(nn.Module):
    """A number in it depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum() * x.abs().max().item() / target.numel()


def test_what_depends_on_values_cannot_be_rehearsed() -> None:
    with pytest.raises(PlanError, match="the step cannot be rehearsed"):
        candidate_of(Reading, "replicate").work(0, 8)
