"""Gradients are reduced while the backward pass runs, in one order, and are those of the local model."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.dryrun.silent import SilentGroup
from whalepy.errors import PlanError, WhaleError
from whalepy.runtime import reduction
from whalepy.runtime.bridge import Move
from whalepy.runtime.groups import start_process_group
from whalepy.runtime.kernels import Shard
from whalepy.runtime.reduction import Reduction
from whalepy.runtime.storage import Stored
from whalepy.runtime.switches import turned_off


class Layers(nn.Module):
    """Six layers; the gain of the third has no gradient, as what it makes is detached."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.gain = nn.Parameter(torch.ones(16))
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if k == 2:
                x = x + (x * self.gain).detach() if self.detached else x * self.gain
        return x.square().mean()


def _trained(detached: bool, microbatches: int, off: str, scopes: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """Per step, the buckets that were on their way when the backward pass had ended; and all gradients."""
    torch.manual_seed(0)
    model, batch = Layers(detached=detached), (torch.randn(12, 16),)
    seen: list[list[int]] = []
    finish = Reduction.finish

    def told(self: Reduction) -> None:
        seen.append([k for k, bucket in enumerate(self.buckets) if bucket.summing is not None])
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "WHALEPY_OFF", off)
        patch.setattr(reduction, "BUCKET_BYTES", 1200)  # a weight and a bias
        patch.setattr(Reduction, "finish", told)
        devices = "1xcpu + 1xcpu*0.5" if dist.get_world_size() == 2 else "2xcpu + 2xcpu*0.5"
        parallel = whalepy.compile(whalepy.annotate(model, scopes), devices, batch, microbatches=microbatches)
        for _ in range(2):
            parallel.train_step(*parallel.local_batch(batch))
    return seen, parallel.full_gradients()


def _local(detached: bool) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model, batch = Layers(detached=detached), torch.randn(12, 16)
    for _ in range(2):
        model(batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check(found: dict[str, Tensor | None], detached: bool) -> None:
    for name, expected in _local(detached).items():
        given = found[name]
        if expected is None:
            assert given is None
        else:
            torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_buckets_go_while_the_backward_pass_runs(workers: Pool, microbatches: int) -> None:
    for seen, gradients in workers.run(2, _trained, False, microbatches, "", {"": whalepy.replicate(2)}):
        assert len(seen) == 2 and all(len(early) > 5 for early in seen)
        check(gradients, detached=False)


def test_a_gradient_that_does_not_come_holds_up_those_behind_it_only(workers: Pool) -> None:
    for seen, gradients in workers.run(2, _trained, True, 1, "", {"": whalepy.replicate(2)}):
        assert all(0 < len(early) < 6 and early == list(range(len(early))) for early in seen)
        check(gradients, detached=True)


def _left_after_steps() -> int:
    found: list[weakref.ref[Any]] = []
    finish = Reduction.finish

    def told(self: Reduction) -> None:
        finish(self)
        found.extend(weakref.ref(one) for one in (self, *self.leaves.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reduction, "finish", told)
        model, batch = whalepy.annotate(Layers(), {"": whalepy.replicate(2)}), (torch.randn(12, 16),)
        parallel = whalepy.compile(model, "2xcpu", batch)
        for _ in range(3):
            parallel.train_step(*parallel.local_batch(batch))
    assert len(found) > 3
    kept = [one() for one in found]
    gradients = sum(leaf.grad is not None for leaf in kept if isinstance(leaf, Tensor))
    del parallel, kept
    gc.collect()
    return gradients + sum(one() is not None for one in found)


def test_nothing_of_a_step_is_left_after_it(workers: Pool) -> None:
    """No gradient, and with the model nothing at all."""
    assert workers.run(2, _left_after_steps) == [0, 0]


def test_it_can_be_turned_off(workers: Pool) -> None:
    for seen, gradients in workers.run(2, _trained, False, 1, "early-reduction", {"": whalepy.replicate(2)}):
        assert seen == [[], []]
        check(gradients, detached=False)


def test_what_the_backward_pass_communicates_over_is_reduced_after_it(workers: Pool) -> None:
    """The biases that are not split get a partial gradient on the level that activations cross."""
    for seen, gradients in workers.run(2, _trained, False, 1, "", {"": whalepy.split(2)}):
        assert seen == [[], []]
        check(gradients, detached=False)


def test_replicas_of_split_layers_reduce_early_over_the_replicas_alone(workers: Pool) -> None:
    scopes = {"": [whalepy.replicate(2), whalepy.split(2)]}
    for seen, gradients in workers.run(4, _trained, False, 2, "", scopes):
        assert all(early for early in seen)
        check(gradients, detached=False)


def _with_a_bucket_that_goes_too_soon() -> Any:
    came = Reduction._came

    def too_soon(self: Reduction, bucket: reduction.Bucket, name: str) -> None:
        bucket.missing = {name}
        came(self, bucket, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reduction, "_came", too_soon)
        return _trained(False, 1, "", {"": whalepy.replicate(2)})[1]


def test_a_bucket_that_goes_too_soon_would_be_noticed(workers: Pool) -> None:
    for gradients in workers.run(2, _with_a_bucket_that_goes_too_soon):
        with pytest.raises(AssertionError):
            check(gradients, detached=False)


class Told(SilentGroup):
    """The group of two ranks as the first sees it; it notes what is asked of it, and what that sends."""

    def __init__(self) -> None:
        super().__init__(0, 2, 0, None)
        self.log: list[tuple[str, int]] = []

    def _count(self, kind: str, sent: int) -> None:
        self.log.append((kind, sent))


def _order(fires: set[str]) -> list[tuple[str, int]]:
    """What one rank asks of a group, on which the gradients of these parameters come in the backward pass."""
    group, other = Told(), Told()
    plain = Move(group, "R", "R", "P", "R")
    busy = Move(other, "R", "R", "P", "R")
    halves = Shard.along((6,), 0, (3, 3))
    part = Move(group, halves, "R", "P", halves)
    reading = {"a": (plain,), "b": (plain,), "both": (plain, busy), "part": (part,)}
    sizes = {"a": 3, "b": 4, "both": 5, "part": 6}
    leaves = {name: torch.zeros(size, requires_grad=True) for name, size in sizes.items()}
    boxes = {name: nn.Parameter(torch.zeros(3 if name == "part" else size)) for name, size in sizes.items()}
    stored = [Stored(name, (size,), (), reading[name]) for name, size in sizes.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "BUCKET_BYTES", 1)
        made = Reduction(stored, leaves, boxes, {group: None, other: None}, early=True, busy=[other])
    made.watch()
    for name in sorted(fires):
        leaves[name].sum().backward()
    for name in sizes.keys() - fires:
        leaves[name].grad = torch.zeros(sizes[name])
    made.finish()
    return group.log


def test_groups_see_one_order_whichever_gradients_came() -> None:
    orders = [_order({"a", "b"}), _order({"a"}), _order({"b"}), _order(set())]
    assert orders == [[("all-reduce", 12), ("all-reduce", 16), ("reduce-scatter", 12), ("all-reduce", 20)]] * 4


def _turned_off(texts: list[str]) -> Any:
    os.environ["WHALEPY_OFF"] = texts[dist.get_rank()]
    try:
        return turned_off(start_process_group(torch.device("cpu")))
    except WhaleError as error:
        return str(error)
    finally:
        del os.environ["WHALEPY_OFF"]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["early-reduction", "early-reduction"], frozenset({"early-reduction"})),
        (
            ["", "faster"],
            "WHALEPY_OFF names 'faster' on rank 1\n  fix: choose from early-reduction, "
            "asynchronous-bridges, gradients-during-bridges, kept-memory, asynchronous-agreement",
        ),
        (
            ["", "early-reduction"],
            "WHALEPY_OFF is 'early-reduction' on rank 1 and '' on rank 0\n  fix: give all ranks the same",
        ),
    ],
)
def test_ranks_turn_off_the_same(workers: Pool, texts: list[str], told: Any) -> None:
    assert workers.run(2, _turned_off, texts) == [told] * 2


@pytest.mark.parametrize(("total", "delay"), [(500 * 10**6, 10**6), (4 * 10**9, 34286), (10**8, 10**7)])
def test_no_other_number_of_buckets_takes_less_time(total: int, delay: int) -> None:
    """Of the latencies of n collectives, and what is moved when the backward pass is over, in bytes of the links."""

    def seconds(buckets: int) -> float:
        return buckets * delay + total / buckets

    size = reduction.bucket_bytes(total, delay)
    assert size > 2**20
    best = min(seconds(n) for n in range(1, 1000))
    assert seconds(max(round(total / size), 1)) == pytest.approx(best, rel=1e-3)


def test_buckets_have_a_least_size() -> None:
    assert reduction.bucket_bytes(10**8, 0) == 2**20
    assert reduction.bucket_bytes(10**8, None) == reduction.BUCKET_BYTES


def test_the_plan_says_how_large_buckets_are_and_may_be_changed(tmp_path: Path) -> None:
    model, batch = whalepy.annotate(Layers(), {"": whalepy.replicate(2)}), (torch.zeros(12, 16),)
    plan = whalepy.plan(model, "2xA100-SXM4-80GB", batch)
    (delay,) = plan.stages[0].delay_bytes
    assert delay is not None and delay > 0
    changed = replace(plan, stages=(replace(plan.stages[0], delay_bytes=(7,)),))
    changed.save(tmp_path / "changed.plan")
    again = whalepy.plan(model, "2xA100-SXM4-80GB", batch, plan=tmp_path / "changed.plan")
    assert again.stages[0].delay_bytes == (7,)
    assert whalepy.plan(model, "2xcpu", batch).stages[0].delay_bytes == (None,)


def test_a_plan_with_delays_of_other_levels_is_not_read() -> None:
    plan = whalepy.plan(whalepy.annotate(Layers(), {"": whalepy.replicate(2)}), "2xcpu", (torch.zeros(12, 16),))
    wrong = replace(plan, stages=(replace(plan.stages[0], delay_bytes=(7, 7)),))
    with pytest.raises(PlanError) as raised:
        type(plan).from_json(wrong.to_json())
    assert "2 delay_bytes for 1 levels\n  fix: save it again" in str(raised.value)
