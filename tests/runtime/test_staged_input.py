"""What users get wrong with stages, and what they get told: every message whole."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests import pipelines
from tests.pool import Pool
from whalepy.errors import AnnotationError, PlanError, WhaleError

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    """Three layers, and one that computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.same = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.same(self.two(self.one(x)))).square().mean()


class Normed(Mlp):
    """The same with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))


class Back(nn.Module):
    """A stage that is entered again after one whose results it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.first, self.second = whalepy.stage(), whalepy.stage()  # line: again

    def forward(self, x: Tensor) -> Tensor:
        with self.first:
            x = self.one(x)
        with self.second:
            x = self.two(x)  # line: inside
        with self.first:
            return self.one(x).square().mean()  # line: reads


class RootMean(Mlp):
    """A loss that is no sum over rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sqrt()  # line: root


def planned(scopes: dict[str, Any], cluster: str = "2xcpu", model: type[nn.Module] = Mlp, **options: Any) -> Any:
    return whalepy.plan(whalepy.annotate(model(), scopes), cluster, (ROWS,), **options)


def two(first: Any = None, second: Any = None) -> dict[str, Any]:
    return {"one": first or whalepy.stage(), "two": second or whalepy.stage()}


PLANS: dict[str, tuple[Callable[[], Any], type[WhaleError], str]] = {
    "a stage without operators": (
        lambda: planned({**two(), "same": whalepy.stage()}),  # line: nothing
        AnnotationError,
        'stage() on "same" has no operators\n'
        "  at:  {nothing}\n"
        "  fix: put stages on modules whose forward computes something",
    ),
    "a stage that reads from a later one": (
        lambda: planned({}, model=Back),
        AnnotationError,
        "stage() ({again}) reads what a later stage, stage() ({again}), computes (aten.linear, {inside})\n"
        "  at:  {reads}\n"
        "  fix: let data flow one way: do not enter a stage again after a later one whose results it would read",
    ),
    "more stages than devices": (
        lambda: planned({**two(), "three": whalepy.stage()}),
        AnnotationError,
        "3 stages and what is inside them need 3 devices, 2 are there\n"
        "  at:  test_staged_input.py:{line}\n"
        "  fix: use fewer stages or smaller degrees, let stages share devices with schedule='interleaved:2', or give a "
        "larger cluster",
    ),
    "a stage too small for its scopes": (
        lambda: planned(two(whalepy.stage(1), [whalepy.stage(1), whalepy.split(2)])),  # line: small
        AnnotationError,
        "stage(1) has 1 devices, the scopes inside it need 2\n"
        "  at:  {small}\n"
        "  fix: write stage(2), or degrees inside whose product divides 1",
    ),
    "an absent rank": (
        lambda: planned({"": whalepy.cluster([[0], [7]]), **two()}),  # line: absent
        AnnotationError,
        "cluster([[0], [7]]) names rank 7, which the cluster does not have\n  at:  {absent}\n  fix: ranks are 0 to 1",
    ),
    "a repeated rank": (
        lambda: whalepy.cluster([[0], [0]]),  # line: repeated
        AnnotationError,
        "cluster([[0], [0]]): rank 0 stands in it twice\n"
        "  at:  {repeated}\n"
        '  fix: write "auto", "all", {{"average": 2}}, {{"row": 2}}, {{"type": "V100-SXM2-32GB"}}, {{"node": 0}}, '
        "or one list of ranks per virtual device like [[0, 1], [2, 3]]",
    ),
    "a type that is not there": (
        lambda: planned({"": whalepy.cluster({"type": "V100"}), **two()}),  # line: type
        AnnotationError,
        "cluster({{'type': 'V100'}}) selects no device\n  at:  {type}\n  fix: the cluster has type cpu",
    ),
    "lists that are no divisor of the stages": (
        lambda: planned({"": whalepy.cluster([[0], [1]]), **two(), "three": whalepy.stage()}),  # line: lists
        AnnotationError,
        "cluster([[0], [1]]) lists 2 virtual devices for 3 stages\n"
        "  at:  {lists}\n"
        "  fix: give one list of ranks per stage",
    ),
    "a loss that is no sum over rows": (
        lambda: planned(two(), model=RootMean, microbatches=2),
        PlanError,
        "the loss is not a sum over rows: aten.sqrt needs all rows at once, so microbatches would change it\n"
        "  at:  {root}\n"
        "  fix: leave out microbatches=, or make the loss a sum or a mean over rows",
    ),
    "a schedule that does not exist": (
        lambda: planned(two(), schedule="1f2b"),
        PlanError,
        "there is no schedule '1f2b'\n  fix: did you mean 1f1b?",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), PLANS.values(), ids=PLANS)
def test_plans(make: Callable[[], Any], kind: type[WhaleError], message: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    shown = re.sub(r"(?<=at:  )test_staged_input\.py:\d+", "test_staged_input.py:{line}", str(caught.value))
    expected = message.format(**_lines(), line="{line}")
    assert str(caught.value) == expected or shown == expected


def _lines() -> dict[str, str]:
    """The lines marked in this file, by their names."""
    text = Path(__file__).read_text().splitlines()
    found = {m[1]: k for k, line in enumerate(text, 1) if (m := re.search(r"# line: (\w+)$", line))}
    return {name: f"{Path(__file__).name}:{line}" for name, line in found.items()}


def test_microbatches_chosen_here_do_not_change_a_loss_that_is_no_sum() -> None:
    with pytest.warns(UserWarning, match=r"^1 microbatches are fewer than 2 stages: every device waits 50% of a step"):
        plan = planned(two(), model=RootMean)
    assert plan.microbatches == 1
    assert "one microbatch: the loss is not a sum over rows: aten.sqrt needs all rows at once" in plan.explain()


def test_batch_norm_is_told_as_the_reason_of_one_microbatch() -> None:
    with pytest.warns(UserWarning, match=r"^1 microbatches are fewer than 2 stages"):
        plan = planned(two(), model=Normed)
    assert plan.microbatches == 1
    assert "one microbatch: batch norm takes its statistics from all rows that it sees at once" in plan.explain()


def test_devices_that_nothing_can_use_are_idle_and_told() -> None:
    with pytest.warns(UserWarning, match=r"^rank 2 is idle: the scopes cannot use all 3 devices$"):
        plan = planned({"": whalepy.replicate(2)}, "3xcpu")
    assert plan.idle == (2,)
    assert "rank 2 is idle" in str(plan) and "rank 2 is idle" in plan.explain()
    with pytest.raises(PlanError, match=r"^rank 2 is idle\n"):
        plan.program(2)


def test_a_stage_left_open_takes_what_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = planned(two(), "5xcpu")
    assert sorted(len(stage.rank_of) for stage in plan.stages) == [2, 3]


def test_a_list_of_ranks_places_the_stages() -> None:
    plan = planned({"": whalepy.cluster([[1], [0]]), **two()})
    assert [stage.rank_of for stage in plan.stages] == [(1,), (0,)]


def test_scopes_of_a_program_say_which_stage_a_rank_runs() -> None:
    plan = planned(two(), microbatches=2)
    text = str(plan.program(1))
    assert text.startswith("actions of a step: 1RECV_F0<0 ") and "stage 1 of 2\n" in text
    assert "received_0 = received" in text and "one.weight" not in text


def test_without_a_launcher_the_stages_run_on_one_device() -> None:
    model, batches = pipelines.skipping()
    local, _ = pipelines.skipping()
    parallel = whalepy.compile(model, None, batches[0])
    loss = parallel.train_step(*parallel.local_batch(batches[0]))
    expected = local(*batches[0])
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in parallel.full_gradients().items():
        assert gradient is not None and torch.allclose(gradient, local.get_parameter(name).grad)  # type: ignore[arg-type]


def without_arguments() -> list[float]:
    model, batches = pipelines.gpt2()
    scopes = pipelines.staged(pipelines.blocks("transformer.h.*", (0, 1, 2, 4)))
    parallel = whalepy.compile(whalepy.annotate(model, scopes), "3xcpu", batches[0])
    given = parallel.local_batch(batches[0])
    middle = parallel.plan.stages_of(parallel._host.position) == (1,)
    return [float(parallel.train_step(**given)), float(parallel.train_step(**({} if middle else given)))]


def test_a_rank_whose_stage_reads_no_input_needs_none(workers: Pool) -> None:
    for first, second in workers.run(3, without_arguments):
        assert first == second


def rows_missing() -> str:
    model, batches = pipelines.gpt2()
    scopes = pipelines.staged(pipelines.blocks("transformer.h.*", (0, 2, 4)))
    parallel = whalepy.compile(whalepy.annotate(model, scopes), "2xcpu", batches[0])
    given = parallel.local_batch(batches[0])
    if parallel._host.position == 1:
        given = {name: value[:-1] for name, value in given.items()}
    with pytest.raises(WhaleError) as caught:
        parallel.train_step(**given)
    return str(caught.value)


def test_rows_that_differ_between_stages_are_an_error_on_every_rank(workers: Pool) -> None:
    first, second = workers.run(2, rows_missing)
    assert first == second
    assert "ranks were given [8, 7] rows" in first


def dropped() -> list[float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_head=4, n_layer=2, n_positions=32))
    ids = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(1))
    scopes = pipelines.staged(pipelines.blocks("transformer.h.*", (0, 1, 2)))
    batch = {"input_ids": ids, "labels": ids}
    parallel = whalepy.compile(whalepy.annotate(model, scopes), "2xcpu", batch, microbatches=4, seed=3)
    losses = [float(parallel.train_step(**parallel.local_batch(batch))) for _ in range(2)]
    return [*losses, float(parallel.clip_grad_norm_(1.0))]


def test_dropout_repeats_bit_for_bit_and_changes_from_step_to_step(workers: Pool) -> None:
    runs = [workers.run(2, dropped) for _ in range(2)]
    assert runs[0] == runs[1] and runs[0][0] == runs[0][1]
    assert runs[0][0][0] != runs[0][0][1]
