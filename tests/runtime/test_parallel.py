"""What else a ParallelModel promises: one rank, late capture, structures of batches, programs, names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests import models
from tests.exactness import Run, compare, outcome
from tests.pool import Pool


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def three_to_one(rank: int) -> slice:
    return slice(0, 6) if rank == 0 else slice(6, 8)


# -- one rank


def annotated_for_one() -> dict[str, Any]:
    return {"": [whalepy.replicate(), whalepy.split()]}


ALONE: dict[str, Run] = {
    "gpt2": Run(models.gpt2, annotated_for_one, 1, steps=2, evaluate=True, output=lambda o: o.logits),
    "own model": Run(lambda: models.residual((8, 5)), dict, 1, loss_fn=models.classes_loss, clip=(0.01, 2.0)),
    "microbatches": Run(models.bert, dict, 1, steps=1, options={"microbatches": 3}),
}


@pytest.mark.parametrize("run", ALONE.values(), ids=ALONE)
def test_without_a_launcher_it_trains_on_one_device(run: Run) -> None:
    assert "RANK" not in os.environ
    assert outcome(run).wrong == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("launched", [True, False], ids=["a group is open", "compile opens one"])
def test_one_rank_under_a_launcher(workers: Pool, launched: bool) -> None:
    def train() -> list[str]:
        run = Run(models.scaled_twice, dict, 1, steps=1)
        return outcome(run).wrong

    assert workers.run(1, train, default_group=launched) == [[]]


def test_compile_opens_the_process_group(workers: Pool) -> None:
    def train() -> tuple[list[str], bool]:
        wrong = outcome(Run(models.scaled_twice, uneven, 2, steps=1)).wrong
        return wrong, torch.distributed.is_initialized()

    assert workers.run(2, train, default_group=False) == [([], True), ([], True)]


# -- the mission's own call


def captured_late() -> list[float]:
    model, batches = models.residual((8, 8, 3))
    parallel = whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", loss_fn=models.classes_loss)
    first = parallel.local_batch(batches[0])
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = [float(parallel.train_step(*first))]
    optimizer.step()
    return [*losses, float(parallel.train_step(*parallel.local_batch(batches[0])))]


def test_capture_at_the_first_local_batch(workers: Pool) -> None:
    model, batches = models.residual()
    image, side, target = batches[0]
    local: list[float] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = models.classes_loss(model(image, side), target)
        loss.backward()
        optimizer.step()
        local.append(loss.item())
    one, other = workers.run(2, captured_late)
    assert one == other
    assert one[0] == pytest.approx(local[0], rel=1e-6)
    assert one[1] != one[0]


# -- batches


def batch_of(kind: Callable[[tuple[Any, ...]], Any]) -> list[Any]:
    """How this rank's rows come back, for a batch given as `kind`."""
    model, batches = models.residual()
    parallel = whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", batches[0], loss_fn=models.classes_loss)
    rows = parallel.local_batch(kind((torch.arange(8), torch.arange(8) * 2)))
    values = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, tuple | list) else [rows]
    return [type(rows).__name__, *(value.tolist() for value in values)]


@pytest.mark.parametrize(
    ("kind", "name", "factors"),
    [
        (tuple, "tuple", [1, 2]),
        (list, "list", [1, 2]),
        (lambda pair: {"z": pair[0], "a": pair[1]}, "dict", [1, 2]),  # keys keep their order
        (lambda pair: pair[1], "Tensor", [2]),
    ],
)
def test_a_batch_keeps_its_structure(workers: Pool, kind: Any, name: str, factors: list[int]) -> None:
    for rank, found in enumerate(workers.run(2, batch_of, kind)):
        mine = list(range(8))[three_to_one(rank)]
        assert found == [name, *([row * factor for row in mine] for factor in factors)]


def loaded() -> list[list[int]]:
    """What a DataLoader with the sampler gives this rank."""
    model, batches = models.residual()
    parallel = whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", batches[0], loss_fn=models.classes_loss)
    loader = torch.utils.data.DataLoader(range(12), batch_sampler=parallel.sampler(range(12)))  # type: ignore[arg-type]
    return [batch.tolist() for batch in loader]


def test_a_sampler_takes_the_batch_size_of_the_example(workers: Pool) -> None:
    assert workers.run(2, loaded) == [[[0, 1, 2, 3, 4, 5], [8, 9, 10]], [[6, 7], [11]]]


# -- evaluation and outputs change nothing


def untouched() -> list[bool]:
    model, batches = models.residual()
    parallel = whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", batches[0], loss_fn=models.classes_loss)
    local = parallel.local_batch(batches[0])
    before = {name: value.clone() for name, value in parallel.state_dict().items()}
    parallel.eval_step(*local)
    with torch.no_grad():
        parallel(*local[:2])
    after = parallel.state_dict()
    grads = all(parameter.grad is None for parameter in parallel.parameters())
    return [grads, all(before[name].equal(after[name]) for name in before), parallel.training]


def test_inference_leaves_values_and_gradients_alone(workers: Pool) -> None:
    assert workers.run(2, untouched) == [[True, True, True]] * 2


# -- looking inside


def program_texts() -> tuple[list[str], list[str]]:
    model, batches = models.scaled_twice()
    whalepy.annotate(model, {"mlp": whalepy.split(2, shares=(3, 1))})
    parallel = whalepy.compile(model, "2xcpu", batches[0])
    same = whalepy.plan(model, "2xcpu", batches[0])
    return [str(parallel.program(r)) for r in (0, 1)], [str(same.program(r)) for r in (0, 1)]


def test_every_rank_prints_the_program_of_every_rank(workers: Pool) -> None:
    one, other = workers.run(2, program_texts)
    assert one == other
    compiled, planned = one
    assert compiled == planned
    assert "whalepy.bridge(" in compiled[0]
    assert "whalepy.retype(" in compiled[0]


# -- names


class Clashing(nn.Module):
    """Submodules and buffers with names that a ParallelModel has methods for."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.program = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("sampler", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.program(self.plan(x)) * self.sampler).square().mean()


def clashing() -> models.Made:
    torch.manual_seed(0)
    return Clashing(), [(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)),)]


def test_a_local_name_may_be_one_of_ours(workers: Pool) -> None:
    compare(workers, Run(clashing, uneven, 2, steps=1))


def trained_from_a_loader(kind: str) -> tuple[list[float], list[float], list[int], list[float]]:
    """Losses of the local model and of this rank's, how many rows the loader gave it, and how far its gradients are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    data = torch.utils.data.TensorDataset(torch.randn(22, 4), torch.randint(3, (22,)))
    batches = [data[at : at + 8] for at in (0, 8, 16)]
    local = [float(torch.nn.functional.cross_entropy(model(x), t)) for x, t in batches]
    torch.nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    wanted = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad()
    scopes = {"0": whalepy.stage(1), "1": whalepy.stage(1), "2": whalepy.stage(1)} if kind == "idle" else None
    whalepy.annotate(model, scopes or {"": whalepy.replicate(shares=(1, 0, 2, 1))})
    options: dict[str, Any] = {"capture": False} if kind == "whole" else {}
    loss = torch.nn.functional.cross_entropy
    parallel = whalepy.compile(model, "4xcpu", batches[0], loss_fn=loss, batch_dim=0, **options)
    loader = list(torch.utils.data.DataLoader(data, batch_sampler=parallel.sampler(data, batch_size=8)))
    losses = [float(parallel.eval_step(x, t)) for x, t in loader]
    parallel.train_step(*loader[0])
    gradients = {name: own.grad for name, own in parallel.named_parameters() if own.grad is not None}
    apart = [float((gradient - wanted[name]).abs().max()) for name, gradient in gradients.items()]
    return local, losses, [len(x) for x, _ in loader], apart


@pytest.mark.parametrize("kind", ["idle", "share of 0", "whole"])
def test_a_rank_that_never_has_rows_is_loaded_one_that_is_left_out(workers: Pool, kind: str) -> None:
    found = workers.run(4, trained_from_a_loader, kind)
    for local, losses, _, apart in found:
        assert losses == pytest.approx(local, rel=1e-5)
        assert max(apart, default=0.0) < 1e-6
    assert any(apart for *_, apart in found)
    rows = [rows for _, _, rows, _ in found]
    assert [1, 1, 1] in rows and (kind == "idle" or rows == [[2, 2, 2], [1, 1, 1], [4, 4, 3], [2, 2, 1]])


def too_small_a_batch() -> str:
    model, batches = models.residual()
    parallel = whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", batches[0], loss_fn=models.classes_loss)
    with pytest.raises(whalepy.WhaleError) as raised:
        parallel.sampler(range(12), batch_size=1)
    return str(raised.value)


def test_a_batch_that_leaves_some_rank_without_rows_has_no_sampler(workers: Pool) -> None:
    for text in workers.run(2, too_small_a_batch):
        assert text.startswith("batch_size 1 leaves some rank without a row")
