"""Random operators: one mask where ranks compute alike, different ones where they hold shards; repeatable."""

from __future__ import annotations

from typing import Any


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
