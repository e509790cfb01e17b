"""Trained whole: buffers of complex numbers, and a model of which nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import whalepy
from tests.pool import Pool

ROWS, WIDTH = 8, 6


class Spectrum(nn.Module):
    """A moving average of spectra, which no loss reads."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        self.average.lerp_(torch.fft.fft(x).mean(0), 0.25)
        return self.linear(x).square().mean()


def uneven(model: nn.Module) -> nn.Module:
    return whalepy.annotate(model, {"": whalepy.replicate(2, shares=(3, 1))})


def test_complex_buffers_are_averaged_by_rows(workers: Pool) -> None:
    def run() -> bool:
        torch.manual_seed(0)
        model, local = Spectrum().double(), Spectrum().double()
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        parallel = whalepy.compile(uneven(model), "2xcpu", (x,), capture=False)
        for _ in range(2):
            parallel.train_step(*parallel.local_batch((x,)))
            local(x)
        return torch.allclose(parallel.full_state_dict()["average"], local.average, rtol=1e-12)

    assert workers.run(2, run) == [True, True]


def test_a_frozen_model_has_a_loss(workers: Pool) -> None:
    def run() -> bool:
        torch.manual_seed(0)
        model = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        x = torch.randn(ROWS, WIDTH)
        expected = model(x).square().mean()
        parallel = whalepy.compile(
            uneven(model), "2xcpu", (x,), loss_fn=lambda y: y.square().mean(), capture=False
        )  # fmt: skip
        loss = parallel.train_step(*parallel.local_batch((x,)))
        return torch.allclose(loss, expected) and all(p.grad is None for p in parallel.parameters())

    assert workers.run(2, run) == [True, True]
