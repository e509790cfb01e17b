"""Models that cannot be captured: refused with the line, and trained whole with unequal shares as in one process."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.errors import AnnotationError, CaptureError, WhaleError

ROWS, WIDTH = 8, 6


class Linears(nn.Module):
    """Two layers; what stands between them cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Branch(Linears):
    """Which layers run depends on the data; the one that does not run has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e6:  # refused here
            y = self.second(y)
        return y.square().mean()


class Loop(Linears):
    """As many turns as the data says, the same for every row."""

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        for _ in range(int(turns.max())):  # refused here
            x = torch.tanh(self.first(x))
        return self.second(x).square().mean()


class Item(Linears):
    """A python number of a tensor steers which layer runs."""

    def forward(self, x: Tensor) -> Tensor:
        largest = self.first(x).abs().max().item()
        layer = self.second if largest < 1e6 else self.first  # refused here
        return layer(self.first(x)).square().mean()


class Numpy(Linears):
    """A constant takes the way through numpy."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.from_numpy(self.first.weight.detach().numpy().copy())  # refused here
        return (self.first(x) @ scale + self.second(x)).square().mean()


class Coin(Linears):
    """A random number of torch decides in python; all ranks draw the same one."""

    def forward(self, x: Tensor) -> Tensor:
        coin = torch.rand((), generator=torch.Generator().manual_seed(3))
        if coin > 0.5:  # refused here
            return self.second(self.first(x)).square().mean()
        return self.first(x).square().mean()


class Hooked(Linears):
    """A forward hook looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(clip_if_large)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


def clip_if_large(_: nn.Module, __: Any, y: Tensor) -> Tensor:
    return y / 2 if y.abs().max() > 1e-6 else y  # refused here


class Remembered(Linears):
    """A dict keeps a number of the data between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        self.seen["largest"] = float(y.detach().abs().max())  # refused here
        return y.square().mean()


class Listed(Linears):
    """Rows as python lists."""

    def forward(self, x: Tensor) -> Tensor:
        signs = [1.0 if row[0] > 0 else -1.0 for row in x.tolist()]  # refused here
        return (self.second(self.first(x)) * torch.tensor(signs, dtype=x.dtype).unsqueeze(1)).sum(1).square().mean()


@dataclass
class Factor:
    """An argument that is neither a tensor nor a number."""

    by: float


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor) -> Tensor:
        ctx.factor = factor
        return x * factor.by

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor.by, None


class Custom(Linears):
    """An autograd function that takes an object, whose backward export would drop."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Scaled.apply(self.first(x), Factor(2.0))).square().mean()


class Halving(Linears):
    """As many steps as the values of a parameter ask for."""

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.second(self.first(x)), self.second.weight.detach().norm()
        while size > 0.5:  # refused here
            y, size = y / 2, size / 2
        return y.square().mean()


def rows(*more: Callable[[], Tensor], steps: int = 2) -> list[Any]:
    """Batches of eight rows, then of seven: shares are rounded anew."""
    torch.manual_seed(5)
    return [(torch.randn(ROWS - step, WIDTH), *(make()[: ROWS - step] for make in more)) for step in range(steps)]


MODELS: dict[type[nn.Module], Callable[[], list[Any]]] = {
    Branch: rows,
    Loop: lambda: rows(lambda: torch.full((ROWS,), 2)),
    Item: rows,
    Numpy: rows,
    Coin: rows,
    Hooked: rows,
    Remembered: rows,
    Listed: rows,
    Custom: rows,
    Halving: rows,
}
# Nothing of the forward's own is where export stops.
WITHOUT_LINE = {Custom}


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def marked(kind: type[nn.Module]) -> str:
    """file:line of the marked line of a model, or of the hook it registers."""
    source: Any = clip_if_large if kind is Hooked else kind
    lines, start = inspect.getsourcelines(source)
    return f"test_whole.py:{start + next(k for k, text in enumerate(lines) if 'refused here' in text)}"


# -- refused, and trained


@pytest.mark.parametrize("kind", MODELS)
def test_capture_refuses_it_at_the_line(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError) as caught:
        whalepy.compile(kind(), "1xcpu", MODELS[kind]()[0])
    error = caught.value
    assert error.fix is not None and "capture=False and loss_weight=" in error.fix
    assert "\n" not in error.what
    if kind not in WITHOUT_LINE:
        assert error.at is not None and marked(kind) in error.at, str(error)


def made(kind: type[nn.Module]) -> Callable[[], tuple[nn.Module, list[Any]]]:
    def make() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        return kind(), MODELS[kind]()

    return make


WHOLE: dict[str, Any] = {"capture": False}


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_whole(workers: Pool, kind: type[nn.Module]) -> None:
    compare(workers, Run(made(kind), uneven, 2, clip=(0.01, 2.0), evaluate=True, options=WHOLE))


# -- the weight of a rank's loss


class Tokens(nn.Module):
    """Cross entropy over tokens that count; -100 elsewhere. Embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.words.weight
        self.unread = nn.Linear(2, 2)

    def forward(self, ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.words(ids))
        if logits.isnan().any():
            raise ValueError
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def counted(ids: Tensor, labels: Tensor) -> Tensor:
    return (labels != -100).sum()


def tokens(ignored_rows: int) -> Callable[[], tuple[nn.Module, list[Any]]]:
    """The last `ignored_rows` of eight rows count no target; the others count unevenly."""

    def make() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        model = Tokens()
        ids = torch.randint(0, 11, (ROWS, 5))
        labels = ids.masked_fill(torch.arange(5) > torch.arange(ROWS).unsqueeze(1) % 4 + 1, -100)
        labels[ROWS - ignored_rows :] = -100
        return model, [{"ids": ids, "labels": labels}, {"ids": ids[:1], "labels": labels[:1]}]

    return make


@pytest.mark.parametrize(
    "ignored_rows",
    [
        0,
        2,  # all rows of the second rank: its weight is zero
    ],
)
def test_targets_that_count(workers: Pool, ignored_rows: int) -> None:
    options = {**WHOLE, "loss_weight": counted}
    compare(
        workers,
        Run(
            tokens(ignored_rows), uneven, 2, evaluate=True, output=lambda out: out.logits, accumulate=2,
            options=options,
        ),
    )  # fmt: skip


def test_without_loss_weight_rows_weigh(workers: Pool) -> None:
    """The mean over rows of means is another loss where rows count unevenly: the control of the test above."""

    def loss() -> tuple[float, float]:
        model, (batch, _) = tokens(0)()
        expected = float(model(**batch).loss)
        whalepy.annotate(model, uneven())
        parallel = whalepy.compile(model, "2xcpu", batch, capture=False)
        return float(parallel.train_step(**parallel.local_batch(batch))), expected

    for found, expected in workers.run(2, loss):
        assert abs(found - expected) > 1e-4


def test_no_weight_anywhere_is_an_error_on_every_rank(workers: Pool) -> None:
    def message() -> str:
        model, (batch, _) = tokens(ROWS)()
        parallel = whalepy.compile(model, "2xcpu", batch, capture=False, loss_weight=counted)
        with pytest.raises(WhaleError) as caught:
            parallel.train_step(**parallel.local_batch(batch))
        return str(caught.value)

    expected = "loss_weight is zero on every rank\n  fix: return the number of rows or targets that count"
    assert workers.run(2, message) == [expected] * 2


# -- buffers


class Buffered(Linears):
    """A moving average of activations, a count, and buffers that no step writes: one infinite, one not saved."""

    average: Tensor
    mask: Tensor
    third: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([0.0] * (WIDTH - 1) + [-float("inf")]))
        self.register_buffer("third", torch.full((WIDTH,), 1 / 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            self.average.lerp_(y.detach().mean(0), 0.1)
            self.steps += 1
        return self.second((y - self.average + self.mask.exp()).softmax(-1) * self.third).square().mean()


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [
        ((3, 1), (8, 8)),
        ((3, 1), (8, 1)),  # the second rank has no row in the second step
        ((0, 1), (8, 8)),  # nor has the first in any
    ],
)
def test_buffers_are_averaged_by_rows(workers: Pool, shares: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    def run() -> list[str]:
        torch.manual_seed(0)
        model = Buffered().double()
        local = copy.deepcopy(model)
        whalepy.annotate(model, {"": whalepy.replicate(2, shares=shares)})
        batches = [torch.randn(n, WIDTH, dtype=torch.float64) for n in sizes]
        parallel = whalepy.compile(model, "2xcpu", (batches[0],), capture=False)
        untouched = {name: parallel.get_buffer(name).clone() for name in ("mask", "third")}
        wrong: list[str] = []
        for x in batches:
            # every rank normalises by the average of the step before it and its own rows: in one process the same,
            # part by part
            first = len(x) * shares[0] / sum(shares)
            parts = [part for part in (x[: round(first)], x[round(first) :]) if len(part)]
            before = local.average.clone()
            averages: list[Tensor] = []
            for part in parts:
                local.average.copy_(before)
                local(part)
                averages.append(local.average * len(part) / len(x))
            local.average.copy_(torch.stack(averages).sum(0))
            parallel.train_step(*parallel.local_batch((x,)))
            if not torch.allclose(parallel.get_buffer("average"), local.average, rtol=1e-12):
                wrong.append(f"average {parallel.get_buffer('average')}, expected {local.average}")
        if int(parallel.get_buffer("steps")) != len(sizes):
            wrong.append(f"steps {parallel.get_buffer('steps')}")
        wrong += [name for name, value in untouched.items() if not parallel.get_buffer(name).equal(value)]
        return wrong

    assert workers.run(2, run) == [[], []]


class Replaced(Linears):
    """The forward puts another tensor in the place of a buffer of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x).detach().mean(0)
        return self.second(self.first(x)).square().mean()


def test_a_buffer_that_the_forward_replaces(workers: Pool) -> None:
    def run() -> bool:
        torch.manual_seed(0)
        model = whalepy.annotate(Replaced().double(), uneven())
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        expected = model.first(x).detach().mean(0)
        parallel = whalepy.compile(model, "2xcpu", (x,), capture=False)
        parallel.train_step(*parallel.local_batch((x,)))
        return torch.allclose(parallel.full_state_dict()["last"], expected, rtol=1e-12)

    assert workers.run(2, run) == [True, True]


def test_modules_set_apart_stay_so(workers: Pool) -> None:
    """A frozen dropout or norm that is in evaluation mode is not put back into training."""

    def modes() -> list[bool]:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout())
        model[1].eval()
        batch = (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
        parallel = whalepy.compile(model, "2xcpu", batch, loss_fn=F.mse_loss, capture=False)
        local = parallel.local_batch(batch)
        parallel.train_step(*local)
        parallel.eval_step(*local)
        return [model.training, model[0].training, model[1].training]

    assert workers.run(2, modes) == [[True, True, False]] * 2


# -- rows, loss_fn, state


def test_without_example_inputs_and_with_loss_fn(workers: Pool) -> None:
    def run() -> tuple[list[list[int]], float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        whalepy.annotate(model, uneven())
        batch = (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
        expected = float(F.mse_loss(model(batch[0]), batch[1]))
        parallel = whalepy.compile(model, "2xcpu", loss_fn=F.mse_loss, capture=False)
        local = parallel.local_batch(batch)
        sampler = parallel.sampler(range(16), batch_size=ROWS)
        return list(sampler), float(parallel.train_step(*local)), expected

    found = workers.run(2, run)
    assert [rows for rows, _, _ in found] == [
        [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 12, 13]],
        [[6, 7], [14, 15]],
    ]
    assert all(loss == pytest.approx(expected, rel=1e-6) for _, loss, expected in found)


def test_state_takes_the_way_through_one_process(workers: Pool) -> None:
    """What full_state_dict gives, a local model and another compiled one load; both names of a tie are there."""

    def run() -> list[str]:
        model, (batch, _) = tokens(0)()
        fresh = copy.deepcopy(model)
        parallel = whalepy.compile(model, "2xcpu", batch, capture=False, loss_weight=counted)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1.0)
        parallel.train_step(**parallel.local_batch(batch))
        optimizer.step()
        state = parallel.full_state_dict()
        again = whalepy.compile(fresh, "2xcpu", batch, capture=False, loss_weight=counted)
        again.load_full_state_dict(state)
        wrong = [name for name, value in again.full_state_dict().items() if not value.equal(state[name])]
        local = Tokens()
        local.load_state_dict(state)
        loss = float(parallel.eval_step(**parallel.local_batch(batch)))
        if abs(loss - float(local(**batch).loss)) > 1e-6:
            wrong.append(f"loss {loss}")
        return wrong

    assert workers.run(2, run) == [[], []]


# -- annotations

ILLEGAL: dict[str, Callable[[], dict[str, Any]]] = {
    "a part": lambda: {"first": whalepy.replicate(2)},
    "another primitive": lambda: {"": whalepy.split(2)},
    "nested": lambda: {"": [whalepy.replicate(2), whalepy.split(1)]},
    "another degree": lambda: {"": whalepy.replicate(3)},
}


@pytest.mark.parametrize("annotations", ILLEGAL.values(), ids=ILLEGAL)
def test_other_annotations_are_refused(workers: Pool, annotations: Callable[[], dict[str, Any]]) -> None:
    def message() -> str:
        model = whalepy.annotate(Branch(), annotations())
        with pytest.raises(AnnotationError) as caught:
            whalepy.compile(model, "2xcpu", rows()[0], capture=False)
        assert caught.value.at is not None and "test_whole.py:" in caught.value.at
        return f"{caught.value.what}\n{caught.value.fix}"

    expected = (
        "capture=False trains the whole model under one replicate level of 2 devices\n"
        "annotate with {'': whalepy.replicate(2)} or not at all"
    )
    assert workers.run(2, message) == [expected] * 2


def test_shares_follow_speed_without_an_annotation(workers: Pool) -> None:
    def count() -> int:
        parallel = whalepy.compile(Branch(), "1xcpu + 1xcpu*0.6", rows()[0], capture=False)
        return len(parallel.local_batch(rows()[0])[0])

    assert sorted(workers.run(2, count)) == [3, 5]


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = Branch()
    with pytest.raises(WhaleError) as caught:
        whalepy.compile(model, "1xcpu", rows()[0], capture=False)
    assert str(caught.value) == (
        "capture=False needs the values of the model: first.weight is on the meta device (4 in all)\n"
        "  fix: build the model on the cpu, or call model.to_empty(device='cpu') and initialise it"
    )
