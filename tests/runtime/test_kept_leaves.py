"""Leaves are kept from step to step, and made anew where a parameter is no longer what it was."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.runtime.captured import StageRun
from whalepy.runtime.executor import StepRun


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


Change = Callable[[Any, Mapping[str, nn.Parameter]], None]


def _nothing(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    pass


def _other_data(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    named["up.weight"].data = named["up.weight"].data * 2


def _transposed_in_place(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    named["up.weight"].data = named["up.weight"].data.t()


def _other_parameter(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    module.up.weight = nn.Parameter(named["up.weight"].detach() * 3)


def _frozen(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    named["down.weight"].requires_grad_(False)


def _updated(module: Any, named: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        named["down.weight"].mul_(0.5)


CHANGES: dict[str, tuple[Change, bool]] = {
    "nothing": (_nothing, True),
    "an update in place": (_updated, True),
    "other memory": (_other_data, False),
    "the same memory in another order": (_transposed_in_place, False),
    "another parameter": (_other_parameter, False),
    "one that no longer learns": (_frozen, False),
}
"""What happens between two steps, and whether leaves are kept over it."""


def _steps(what: str) -> bool:
    """Whether leaves are kept over a change; all gradients have to equal the local model's."""
    change, _ = CHANGES[what]
    torch.manual_seed(0)
    local = Mlp()
    batch = torch.randn(12, 16)
    model = whalepy.annotate(copy.deepcopy(local), {"": whalepy.replicate(2)})
    parallel = whalepy.compile(model, "1xcpu + 1xcpu*0.5", (batch,))
    seen: list[dict[str, Tensor]] = []
    play = StepRun.play

    def told(self: StepRun, *args: Any) -> None:
        play(self, *args)
        seen.append(dict(self.read[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRun, "play", told)
        for made in (_nothing, change, _nothing):
            made(parallel, dict(parallel.named_parameters()))
            made(local, dict(local.named_parameters()))
            parallel.zero_grad()
            local.zero_grad()
            parallel.train_step(*parallel.local_batch((batch,)))
            local(batch).backward()
    first, second, third = ([id(leaf) for leaf in read.values()] for read in seen)
    assert second == third
    whole = parallel.full_gradients()
    for name, parameter in local.named_parameters():
        if parameter.grad is None:
            assert whole[name] is None
        else:
            torch.testing.assert_close(whole[name], parameter.grad)
    return first == second


@pytest.mark.parametrize("what", CHANGES)
def test_gradients_after_a_change(workers: Pool, what: str) -> None:
    _, kept = CHANGES[what]
    assert workers.run(2, _steps, what) == [kept] * 2


def _after_a_failure(off: str) -> bool:
    """A step that fails in its backward pass leaves nothing behind that the next one would add."""
    torch.manual_seed(0)
    local, batch = Mlp(), torch.randn(12, 16)
    scopes = {"": whalepy.replicate(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "WHALEPY_OFF", off)
        parallel = whalepy.compile(whalepy.annotate(copy.deepcopy(local), scopes), "2xcpu", (batch,), microbatches=2)
    reduce = StepRun._PLAYS["REDUCE"]

    def fails(run: Any, action: Any) -> None:
        raise KeyboardInterrupt

    parallel.train_step(*parallel.local_batch((batch,)))
    parallel.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(StepRun._PLAYS, "REDUCE", fails)
        with pytest.raises(KeyboardInterrupt):
            parallel.train_step(*parallel.local_batch((batch,)))
    assert StepRun._PLAYS["REDUCE"] is reduce
    parallel.train_step(*parallel.local_batch((batch,)))
    local(batch).backward()
    for name, parameter in local.named_parameters():
        torch.testing.assert_close(parallel.full_gradients()[name], parameter.grad)
    return True


@pytest.mark.parametrize("off", ["", "early-reduction"])
def test_a_step_that_failed_leaves_no_gradient(workers: Pool, off: str) -> None:
    assert workers.run(2, _after_a_failure, off) == [True, True]


def _kept() -> list[bool]:
    """Of each leaf that is kept, whether it is the memory of its parameter."""
    torch.manual_seed(0)
    batch = torch.randn(12, 16)
    parallel: Any = whalepy.compile(whalepy.annotate(Mlp(), {"": whalepy.split(2)}), "2xcpu", (batch,))
    for _ in range(2):
        parallel.train_step(*parallel.local_batch((batch,)))
    stages: list[StageRun] = [one for run in parallel._runnables.values() for one in run.stages.values()]
    own = dict(parallel.named_parameters())
    return [leaf.data_ptr() == own[name].data_ptr() for one in stages for name, leaf in one.leaves.tensors.items()]


def test_only_what_is_the_memory_of_a_parameter_is_kept(workers: Pool) -> None:
    for kept in workers.run(2, _kept):
        assert kept and all(kept)
