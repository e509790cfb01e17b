from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whalepy
from tests.pool import Pool
from whalepy.program.analysis import Program, analyse
from whalepy.program.canonicalise import canonicalise
from whalepy.program.capture import capture

KV, REP, DH, WIDTH = 4, 2, 3, 10


class Fused(nn.Module):
    """Attention with one projection of unequal parts: queries of 8 heads, keys and values of 4, cut out by slices."""

    def __init__(self) -> None:
        super().__init__()
        heads = KV * REP
        self.qkv = nn.Linear(WIDTH, (heads + 2 * KV) * DH)
        self.out = nn.Linear(heads * DH, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        b, s, _ = x.shape
        fused = self.qkv(x)
        edge = KV * REP * DH
        q = fused[..., :edge].view(b, s, KV * REP, DH).transpose(1, 2)
        k = fused[..., edge : edge + KV * DH].view(b, s, KV, DH).transpose(1, 2)
        v = fused[..., edge + KV * DH :].view(b, s, KV, DH).transpose(1, 2)
        k, v = (y[:, :, None].expand(b, KV, REP, s, DH).reshape(b, KV * REP, s, DH) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"loss": self.out(y.transpose(1, 2).reshape(b, s, -1)).square().sum()}


def analysed() -> Program:
    captured = capture(Fused(), (torch.randn(2, 5, WIDTH),))
    canonicalise(captured.graph)
    return analyse(captured, captured.bind([(2, 5, WIDTH)]))


def test_a_fused_projection_is_cut_by_the_heads_of_its_parts() -> None:
    program = analysed()
    (linear, _) = [op for op in program.operators if op.target == "aten.linear"]
    (attention,) = [op for op in program.operators if op.target == "aten.scaled_dot_product_attention"]
    heads = {o.axis for o in linear.options} & {o.axis for o in attention.options}
    sizes = {program.axes.size(axis) for axis in heads if axis != program.batch}
    assert KV in sizes
    option = next(o for o in linear.options if program.axes.size(o.axis) == KV)
    weight, bias = option.inputs[1:]
    assert weight is not None and bias is not None and (weight.dim, bias.dim) == (0, 0)
    assert [len(part) for part in program.axes.parts(_leaf(program, linear.operands[1])) or ()] == [3, 2, 2]


def _leaf(program: Program, value: tuple[int, int]) -> int:
    (leaf,) = program.axes.leaves(program.dims[value[0]][value[1]][0])
    return leaf


def train_one_step(shares: list[int]) -> tuple[float, tuple[int, ...]]:
    """Largest difference of a gradient from the local model's, and the shape of this rank's box of the weight."""
    torch.manual_seed(0)
    model = Fused().double()
    local, x = copy.deepcopy(model), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    local(x)["loss"].backward()
    whalepy.annotate(model, {"": whalepy.split(2, shares=shares, on="qkv.weight:0")})
    parallel = whalepy.compile(model, "2xcpu", (x,))
    parallel.train_step(x)
    found: dict[str, Any] = parallel.full_gradients()
    worst = max(float((found[n] - p.grad).abs().max()) for n, p in local.named_parameters() if p.grad is not None)
    return worst, tuple(dict(parallel.named_parameters())["qkv.weight"].shape)


@pytest.mark.slow
def test_training_with_three_heads_here_and_one_there_is_exact(workers: Pool) -> None:
    results = workers.run(2, train_one_step, [3, 1])
    assert [shape for _, shape in results] == [(36, WIDTH), (12, WIDTH)]
    assert max(worst for worst, _ in results) < 1e-10
