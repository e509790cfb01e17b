"""Models on the meta device: planned without values, initialised on the ranks, a module at a time."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import whalepy
from tests.pool import Pool
from whalepy.errors import WhaleError
from whalepy.runtime.parallel import ParallelModel

WIDTH, HIDDEN, ROWS = 8, 40, 8


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor with memory that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(made):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self.bytes = max(self.bytes, value.nbytes)
        return made


class Scaled(nn.Module):
    """A layer that initialises itself, and a parameter that nothing does."""

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.BatchNorm1d(WIDTH)
        )
        if own:
            self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return (y * getattr(self, "scale", 1.0)).square().mean()


def example() -> tuple[Tensor]:
    return (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)),)


def on_meta(own: bool) -> nn.Module:
    with torch.device("meta"):
        return Scaled(own)


@pytest.mark.parametrize("kind", ["replicate", "split"])
def test_values_come_from_the_modules_and_are_one_model_s(workers: Pool, kind: str) -> None:
    def run() -> tuple[int, dict[str, list[float]], list[tuple[str, tuple[int, ...]]], float]:
        torch.manual_seed(torch.distributed.get_rank())  # rank 0's values win
        model = whalepy.annotate(on_meta(own=False), {"": getattr(whalepy, kind)(2)})
        largest = Largest()
        store = ParallelModel._store_parameters

        def watched(parallel: ParallelModel) -> None:
            with largest:
                store(parallel)

        with mock.patch.object(ParallelModel, "_store_parameters", watched):
            parallel = whalepy.compile(model, "2xcpu", example())
        state = {name: value.flatten().tolist() for name, value in parallel.full_state_dict().items()}
        boxes = [(name, tuple(p.shape)) for name, p in parallel.named_parameters()]
        assert all(p.device.type == "cpu" for p in (*parallel.parameters(), *parallel.buffers()))
        return largest.bytes, state, boxes, float(parallel.train_step(*parallel.local_batch(example())))

    (bytes_made, state, boxes, loss), (_, other, _, other_loss) = workers.run(2, run)
    assert bytes_made == HIDDEN * WIDTH * 4  # no more than the largest parameter at once
    assert (state, loss) == (other, other_loss)
    torch.manual_seed(0)
    local = Scaled(own=False)
    weight = torch.tensor(state["layers.0.weight"])
    bound = 1 / WIDTH**0.5  # nn.Linear's own distribution: uniform up to 1 / sqrt(inputs)
    assert 0.8 * bound < float(weight.abs().max()) <= bound
    assert abs(float(weight.mean())) < 0.1 * bound
    assert state["layers.3.weight"] == [1.0] * WIDTH and state["layers.3.running_mean"] == [0.0] * WIDTH
    local.load_state_dict({k: torch.tensor(v).view_as(local.state_dict()[k]) for k, v in state.items()})
    if kind == "split":
        assert loss == pytest.approx(local(*example()).item(), rel=1e-5)
        assert ("layers.0.weight", (HIDDEN // 2, WIDTH)) in boxes
    else:
        assert ("layers.0.weight", (HIDDEN, WIDTH)) in boxes


def test_what_nothing_initialises_is_named_and_cured_by_a_state(workers: Pool) -> None:
    def run() -> tuple[str, float, float]:
        parallel = whalepy.compile(whalepy.annotate(on_meta(own=True), {"": whalepy.split(2)}), "2xcpu", example())
        local_rows = parallel.local_batch(example())
        with pytest.raises(WhaleError) as caught:
            parallel.train_step(*local_rows)
        torch.manual_seed(3)
        local = Scaled()
        parallel.load_full_state_dict(local.state_dict())
        return str(caught.value), float(parallel.train_step(*local_rows)), local(*example()).item()

    expected = (
        "nothing initialised scale: the model is on the meta device\n"
        "  fix: give its modules reset_parameters(), or call parallel.load_full_state_dict(...) first"
    )
    for message, loss, own in workers.run(2, run):
        assert message == expected
        assert loss == pytest.approx(own, rel=1e-5)


def gpt2_on_meta(device: str = "meta") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=97, n_positions=32)
    with torch.device(device):
        return GPT2LMHeadModel(config)


def language() -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (ROWS, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


class Weighted(nn.Module):
    """Its forward multiplies by numbers that it writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x) * torch.tensor([1.0, 2.0], device=x.device)).sum()


def test_numbers_that_the_forward_makes_are_refused_on_meta(workers: Pool) -> None:
    def message() -> str:
        with torch.device("meta"):
            model = Weighted()
        with pytest.raises(WhaleError) as caught:
            whalepy.compile(model, "2xcpu", (torch.randn(6, 4),))
        return str(caught.value)

    for text in workers.run(2, message):
        assert text.startswith("the forward makes a tensor of numbers, ")
        assert text.endswith("\n  fix: build the model on the cpu; whalepy.plan takes it as it is")


def test_gpt2_trains_from_meta(workers: Pool) -> None:
    """Empty constants of its cache have no values to lose."""

    def trained() -> tuple[float, float]:
        model = whalepy.annotate(gpt2_on_meta(), {"transformer.h.*": whalepy.split(2)})
        batch = language()
        parallel = whalepy.compile(model, "2xcpu", batch)
        parallel.train_step(**parallel.local_batch(batch))
        local = gpt2_on_meta("cpu").eval()
        local.load_state_dict(parallel.full_state_dict())
        return float(parallel.eval_step(**parallel.local_batch(batch))), float(local(**batch).loss.detach())

    for loss, expected in workers.run(2, trained):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_plan_needs_no_values() -> None:
    model = whalepy.annotate(gpt2_on_meta(), {"transformer.h.*": whalepy.split(2, shares=(3, 1))})
    with Largest() as largest:
        plan = whalepy.plan(model, "2xcpu", language())
    assert largest.bytes < 97 * 32 * 4  # of the embedding: the batch alone has memory
    assert "bridge" in str(plan.program(0))
    assert all(p.device.type == "meta" for p in model.parameters())
