"""Gradients are reduced while the backward pass runs, in one order, and are those of the local model."""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.runtime import reduction
from whalepy.runtime.reduction import Reduction


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
        patch.setattr(reduction, "_LEAST_BYTES", 1200)  # a weight and a bias
        patch.setattr(reduction, "_PARTS", 100)
        patch.setattr(Reduction, "finish", told)
        devices = "2xcpu + 2xcpu*0.5" if len(scopes) > 1 else "1xcpu + 1xcpu*0.5"
        parallel = whalepy.compile(whalepy.annotate(model, scopes), devices, batch, microbatches=microbatches)
        for _ in range(2):
            parallel.train_step(*parallel.local_batch(batch))
    return seen, {name: p.grad for name, p in parallel.named_parameters()}


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
    gc.collect()
    return sum(one() is not None for one in found)


def test_nothing_of_a_step_is_left_after_it(workers: Pool) -> None:
    assert workers.run(2, _left_after_steps) == [0, 0]


def test_it_can_be_turned_off(workers: Pool) -> None:
    for seen, gradients in workers.run(2, _trained, False, 1, "early-reduction", {"": whalepy.replicate(2)}):
        assert seen == [[], []]
        check(gradients, detached=False)


def test_what_the_backward_pass_communicates_over_is_reduced_after_it(workers: Pool) -> None:
    """The biases that are not split get a partial gradient on the level that activations cross."""
    for seen, _ in workers.run(2, _trained, False, 1, "", {"": whalepy.split(2)}):
        assert seen == [[], []]
