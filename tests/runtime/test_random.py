"""Random operators: one mask where ranks compute alike, different ones where they hold shards; repeatable."""

from __future__ import annotations

import statistics
from typing import Any

import pytest


def masks(annotations: Any, seeds: list[int]) -> list[tuple[list[float], list[float], list[list[float]]]]:
    """Per seed: the losses of two steps, the first gradient elements, and the rows of the output in training mode."""
    import torch
    from torch import nn

    import whalepy

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.head = nn.Linear(64, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.dropout(x * self.scale, 0.5, self.training)

    found = []
    for seed in seeds:
        torch.manual_seed(0)
        model = Dropped().double()
        whalepy.annotate(model, annotations(whalepy))
        batch = (torch.ones(8, 64).double(), torch.zeros(8, 64).double())
        parallel = whalepy.compile(model, "2xcpu", batch, loss_fn=nn.MSELoss(), seed=seed)
        local = parallel.local_batch(batch)
        losses = [float(parallel.train_step(*local)) for _ in range(2)]
        gradient = parallel.full_gradients()["scale"]
        with torch.no_grad():
            rows = parallel(*local).tolist()
        found.append((losses, gradient[:8].tolist(), rows))
    return found


def test_the_same_seed_repeats_bitwise_and_another_does_not(workers: Any) -> None:
    for rank in workers.run(2, masks, lambda w: {"": w.replicate(2, shares=[3, 1])}, [1, 1, 2]):
        first, again, other = rank
        assert first == again
        assert first != other
        assert first[0][0] != first[0][1]  # a step does not repeat the one before


def test_rows_of_different_ranks_draw_different_masks(workers: Any) -> None:
    (one,), (two,) = workers.run(2, masks, lambda w: {"": w.replicate(2)}, [1])
    assert one[0] == two[0]  # the loss is that of all rows, on every rank
    assert one[1] == two[1]
    assert one[2] != two[2]


def test_what_ranks_compute_alike_draws_one_mask(workers: Any) -> None:
    # nothing of the model can be cut for want of a scope with an axis: the whole runs on both ranks
    (one,), (two,) = workers.run(2, masks, lambda w: {"head": w.split(2)}, [1])
    assert one == two


def test_half_of_the_elements_survive(workers: Any) -> None:
    for ((_, _, rows),) in workers.run(2, masks, lambda w: {"": w.replicate(2)}, [3]):
        values = [value for row in rows for value in row]
        assert set(values) == {0.0, 2.0}
        assert 0.35 < values.count(2.0) / len(values) < 0.65


# -- dropout in attention and in a language model


def attention_losses(annotations: Any, seed: int, steps: int) -> list[float]:
    """Losses of steps on the same values: they differ by the dropout of attention alone."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import whalepy

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            rows, length, _ = x.shape
            q, k, v = self.qkv(x).view(rows, length, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind()
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
            return F.mse_loss(self.out(y.transpose(1, 2).reshape(rows, length, 8)), target)

    torch.manual_seed(0)
    model = Attention().double()
    x, target = (torch.randn(8, 5, 8, dtype=torch.float64) for _ in range(2))
    if annotations is None:
        return [float(model(x, target)) for _ in range(steps)]
    whalepy.annotate(model, annotations(whalepy))
    parallel = whalepy.compile(model, "2xcpu", (x, target), seed=seed)
    local = parallel.local_batch((x, target))
    return [float(parallel.train_step(*local)) for _ in range(steps)]


def gpt2_losses(annotations: Any, seed: int, steps: int) -> list[float]:
    """The same of GPT-2 with the dropouts it has by default; weights grown so that dropout moves the loss."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import whalepy

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=97, n_positions=32)
    assert min(config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == 0.1
    model = GPT2LMHeadModel(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    ids = torch.randint(0, 97, (8, 12))
    batch = {"input_ids": ids, "labels": ids}
    if annotations is None:
        return [float(model(**batch).loss) for _ in range(steps)]
    whalepy.annotate(model, annotations(whalepy))
    parallel = whalepy.compile(model, "2xcpu", batch, seed=seed)
    local = parallel.local_batch(batch)
    return [float(parallel.train_step(**local)) for _ in range(steps)]


ROWS_CUT = lambda w: {"": w.replicate(2, shares=[3, 1])}  # noqa: E731
HEADS_CUT = lambda w: {"": w.split(2, shares=[3, 1])}  # noqa: E731
BLOCKS_CUT = lambda w: {"transformer.h.*": w.split(2, shares=[3, 1])}  # noqa: E731


@pytest.mark.parametrize(
    ("losses_of", "annotations"),
    [
        (attention_losses, ROWS_CUT),
        (attention_losses, HEADS_CUT),
        (gpt2_losses, ROWS_CUT),
        (gpt2_losses, BLOCKS_CUT),
    ],
)
def test_dropout_of_attention_repeats_and_is_the_local_model_s_on_average(
    workers: Any, losses_of: Any, annotations: Any
) -> None:
    """Means of n draws each differ by more than 5 standard errors once in a million; the seeds are fixed."""
    steps = 60
    one, other = workers.run(2, losses_of, annotations, 1, steps)
    assert one == other  # the same bits on both ranks
    assert len(set(one)) == steps  # a mask of its own in every step
    (again, _), (seeded, _) = workers.run(2, losses_of, annotations, 1, 3), workers.run(2, losses_of, annotations, 2, 3)
    assert again == one[:3]
    assert seeded != again
    local = losses_of(None, 0, 2 * steps)
    error = (statistics.variance(one) / steps + statistics.variance(local) / (2 * steps)) ** 0.5
    assert abs(statistics.fmean(one) - statistics.fmean(local)) < 5 * error
