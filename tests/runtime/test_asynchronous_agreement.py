"""A step begins before all ranks have agreed on it; if they say otherwise than assumed, it begins again or raises."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.errors import BatchError
from whalepy.runtime import agreement, steps
from whalepy.runtime.agreement import Agreement
from whalepy.runtime.groups import ahead_of_collectives, start_process_group


class Classes(nn.Module):
    """The mean is over the targets that count: all ranks have to be asked for their number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.down(torch.tanh(self.up(x))), y)


def _batch(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    y = torch.randint(8, (rows,))
    y[::3] = -100
    return torch.randn(rows, 16), y


def _compiled(off: str, scopes: dict[str, Any], devices: str = "1xcpu + 1xcpu*0.5") -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = Classes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "WHALEPY_OFF", off)
        made = whalepy.annotate(copy.deepcopy(model), scopes)
        return whalepy.compile(made, devices, _batch(12)), model


def _check(parallel: Any, model: nn.Module, rows: int) -> None:
    """A step, and that loss and gradients are the local model's."""
    parallel.zero_grad()
    model.zero_grad()
    loss = parallel.train_step(*parallel.local_batch(_batch(rows)))
    expected = model(*_batch(rows))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    whole = parallel.full_gradients()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad)


def _events(off: str, scopes: dict[str, Any], sizes: list[int]) -> list[list[str]]:
    """Of each step, in order: "waits" for the agreement, and a program "runs" or has "run"."""
    parallel, model = _compiled(off, scopes)
    seen: list[str] = []
    start, run = agreement.start_agreeing, steps.StepProgram.run

    def started(*args: Any) -> Any:
        wait = start(*args)

        def waited() -> Any:
            seen.append("waits")
            return wait()

        return waited

    def ran(self: Any, *args: Any) -> Any:
        seen.append("runs")
        result = run(self, *args)
        seen.append("run")
        return result

    found: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "start_agreeing", started)
        patch.setattr(steps.StepProgram, "run", ran)
        for rows in sizes:
            seen.clear()
            _check(parallel, model, rows)
            found.append(list(seen))
    return found


@pytest.mark.parametrize("scope", ["replicate", "split"])
def test_the_same_sizes_are_assumed(workers: Pool, scope: str) -> None:
    scopes = {"": getattr(whalepy, scope)(2)}
    for first, *others in workers.run(2, _events, "", scopes, [12, 12, 12]):
        assert first == ["waits", "runs", "run"]
        assert others == [["runs", "waits", "run"]] * 2


def test_other_sizes_are_not(workers: Pool) -> None:
    for _, second, third, fourth in workers.run(2, _events, "", {"": whalepy.replicate(2)}, [12, 7, 7, 12]):
        assert second == fourth == ["waits", "runs", "run"]
        assert third == ["runs", "waits", "run"]


def test_it_can_be_turned_off(workers: Pool) -> None:
    for found in workers.run(2, _events, "asynchronous-agreement", {"": whalepy.replicate(2)}, [12, 12]):
        assert found == [["waits", "runs", "run"]] * 2


def _rows_of_one_rank(scopes: dict[str, Any]) -> int:
    """Rank 1 brings fewer rows than before, rank 0 as many; how often a step began again on this rank."""
    parallel, model = _compiled("", scopes)
    again = 0
    settle = Agreement.settle

    def counted(self: Agreement) -> None:
        nonlocal again
        try:
            settle(self)
        except agreement.Otherwise:
            again += 1
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agreement, "settle", counted)
        for rows in (12, 12, 11, 11, 12):  # rank 0 has 8, 8, 7 or 8, ... of them
            _check(parallel, model, rows)
    return again


def test_a_rank_whose_rows_are_the_same_hears_of_the_others(workers: Pool) -> None:
    assert sum(workers.run(2, _rows_of_one_rank, {"": whalepy.replicate(2)})) > 0


def _wrong_on_rank_1() -> list[str]:
    parallel, model = _compiled("", {"": whalepy.replicate(2)})
    rank = start_process_group(torch.device("cpu")).position
    told: list[str] = []
    for _ in range(2):
        _check(parallel, model, 12)
        x, y = parallel.local_batch(_batch(12))
        for args in ((x, y[:-1]) if rank else (x, y), (x.double(), y) if rank else (x, y)):
            try:
                parallel.train_step(*args)
            except BatchError as error:
                told.append(str(error).splitlines()[0])
        try:
            (parallel.eval_step if rank else parallel.train_step)(x, y)
        except BatchError as error:
            told.append(str(error).splitlines()[0])
        _check(parallel, model, 12)
    return told


def test_an_error_of_one_rank_is_raised_on_all(workers: Pool) -> None:
    first, second = workers.run(2, _wrong_on_rank_1)
    assert first == second and len(first) == 6


class Unsettled(Exception):
    pass


def _ahead(padded: bool) -> list[int]:
    """What a rank has sent where nothing may be sent yet, by each collective; every one of them has to ask."""
    group = start_process_group(torch.device("cpu"))
    group.sums_by_exchange = not padded
    sizes = [3, 3] if padded else [5, 0]
    own, whole = torch.ones(sizes[group.position]), torch.ones(sum(sizes))
    blocks = group.blocks(sizes)
    scattered = group.scatter_blocks(sizes)
    calls: list[Callable[[], Any]] = [
        lambda: group.all_reduce(whole),
        lambda: group.all_gather(own, sizes),
        lambda: group.reduce_scatter(torch.ones(scattered.total), scattered, torch.float32),
        lambda: group.exchange(whole, blocks, group.blocks([own.numel()] * 2)),
    ]

    def refuse() -> None:
        raise Unsettled

    sent: list[int] = []
    for call in calls:
        group.sent_bytes = 0
        with ahead_of_collectives(refuse), pytest.raises(Unsettled):
            call()
        sent.append(group.sent_bytes)
    for call in calls:  # outside, nobody asks
        call()
    return sent


@pytest.mark.parametrize("padded", [True, False])
def test_every_collective_asks_first(workers: Pool, padded: bool) -> None:
    assert workers.run(2, _ahead, padded) == [[0] * 4] * 2


def _with_an_idle_rank() -> bool:
    """Two pairs of leaves, three ranks: the last one has no rows, and hears of the step all the same."""
    parallel, model = _compiled("", {"": [whalepy.cluster([[0, 1]]), whalepy.replicate(2)]}, "3xcpu")
    for rows in (12, 12, 9, 9, 12):
        _check(parallel, model, rows)
    return parallel.plan.idle == (2,)


def test_a_rank_that_is_idle_agrees_too(workers: Pool) -> None:
    assert workers.run(3, _with_an_idle_rank) == [True] * 3
