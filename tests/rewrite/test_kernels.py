from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from whalepy.rewrite import kernels

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def t(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, requires_grad=True)


def test_masked_embedding_without_rows_gives_zeros_that_reach_the_weight() -> None:
    weight = t(0, 4)
    result = kernels.masked_embedding(weight, torch.tensor([[1, 2], [3, 0]]), 5)
    assert result.shape == (2, 2, 4) and not result.any()
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert gradient.shape == (0, 4)


# padding index -> whether the shard of rows 3, 4, 5 gives its row a gradient
PADDING = [(-1, True), (4, False), (0, True)]


@pytest.mark.parametrize(("padding", "learns"), PADDING)
def test_the_padding_row_learns_nothing_where_it_lies(padding: int, learns: bool) -> None:
    weight = t(3, 2)
    result = kernels.masked_embedding(weight, torch.tensor([4, 4, 0]), 3, padding)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert gradient.tolist() == [[0, 0], [2 * learns, 2 * learns], [0, 0]]
    assert result[2].tolist() == [0, 0]  # row 0 lies elsewhere


@pytest.mark.parametrize("mean", [False, True])
def test_bags_of_all_shards_add_up(mean: bool) -> None:
    table, rows = t(6, 2), torch.tensor([[0, 5, 5], [1, 2, 3]])
    parts = [kernels.masked_bags(table[start:end], rows, mean, start) for start, end in [(0, 4), (4, 4), (4, 6)]]
    whole = F.embedding_bag(rows, table, mode="mean" if mean else "sum")
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad((x**2).sum(), table)[0] for x in (sum(parts), whole)))


def test_local_index_counts_from_the_start_of_the_shard() -> None:
    x = t(3, 4)
    found = kernels.local_index(x, [torch.tensor([5, 7]), torch.tensor([0, 3])], [5, None])
    assert torch.equal(found, x[torch.tensor([0, 2]), torch.tensor([0, 3])])


# dims, keepdim -> shape
MEANS = [([], False, ()), ([1], False, (2, 4)), ([0, 2], True, (1, 3, 1))]


@pytest.mark.parametrize(("dims", "keepdim", "shape"), MEANS)
def test_global_mean_divides_by_the_count_of_all(dims: list[int], keepdim: bool, shape: tuple[int, ...]) -> None:
    x = t(2, 3, 4)
    found = kernels.global_mean(x, dims, keepdim, 100, None)
    torch.testing.assert_close(found, (x.sum(dims, keepdim) if dims else x.sum()) / 100)
    assert found.shape == shape
    assert kernels.global_mean(x, dims, keepdim, 100, torch.float32).dtype is torch.float32


def test_seeded_draws_from_its_stream_and_leaves_the_generator_alone() -> None:
    dropout = kernels.Seeded(aten.dropout.default)
    before = torch.get_rng_state()
    one, again, other = (dropout(stream, torch.ones(100), 0.5, True) for stream in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert dropout.__name__ == "seeded_dropout_default"


def test_guarded_is_the_operator_where_nothing_is_empty() -> None:
    x = t(2, 3, 4)
    pool = kernels.Guarded(aten.max_pool1d.default, (torch.float64,))
    assert torch.equal(pool([[2, 3, 2]], x, [2]), aten.max_pool1d.default(x, [2]))
    assert pool.__name__ == "guarded_max_pool1d_default"


def test_guarded_gives_zeros_where_an_operand_is_empty() -> None:
    sample = kernels.Guarded(aten.grid_sampler.default, (torch.float64,))
    result = sample([[2, 0, 5, 5]], t(2, 0, 4, 4), t(2, 5, 5, 2), 0, 0, False)
    assert result.shape == (2, 0, 5, 5) and result.dtype == torch.float64


def test_guarded_gives_each_result_its_type() -> None:
    pool = kernels.Guarded(aten.max_pool2d_with_indices.default, (torch.float64, torch.int64))
    values, indices = pool([[0, 3, 2, 2], [0, 3, 2, 2]], t(0, 3, 4, 4), [2, 2])
    assert (values.dtype, indices.dtype) == (torch.float64, torch.int64)


# input channels, output channels, bias -> what comes out: nothing, or the bias alone
EMPTY = [(0, 4, True), (0, 4, False), (3, 0, True)]


@pytest.mark.parametrize(("inputs", "outputs", "bias"), EMPTY)
def test_a_convolution_without_channels_is_its_bias(inputs: int, outputs: int, bias: bool) -> None:
    x, weight, b = t(2, inputs, 5), t(outputs, inputs, 3), t(outputs) if bias else None
    result = kernels.Convolution(aten.conv1d.default, None)([2, outputs, 3], x, weight, b)
    assert result.shape == (2, outputs, 3)
    torch.testing.assert_close(
        result, torch.zeros(2, outputs, 3, dtype=x.dtype) if b is None else b[:, None] + 0 * result
    )
    if b is not None:
        assert torch.equal(torch.autograd.grad(result.sum(), b)[0], torch.full_like(b, 6))


def test_a_grouped_convolution_takes_its_groups_from_its_channels() -> None:
    x, weight, bias = t(2, 4, 5), t(6, 2, 3), t(6)
    local = kernels.Convolution(aten.conv1d.default, 3)
    found = local([2, 6, 3], x, weight, bias, [1], [0], [1], 8)  # 8 groups in the whole model, 2 here
    torch.testing.assert_close(found, F.conv1d(x, weight, bias, groups=2))


class Alone:
    """A level of one position."""

    def sum(self, x: Tensor) -> Tensor:
        return x.clone()

    def max(self, x: Tensor) -> Tensor:
        return x.clone()


# logits, targets, ignored class
LOSSES: list[tuple[Any, list[int], int]] = [
    ((4, 6), [0, 5, 2, 2], -100),
    ((4, 6), [0, -100, 2, -100], -100),
    ((3, 6), [1, 1, 1], 1),  # every row ignored
    ((0, 6), [], -100),  # no rows
]


@pytest.mark.parametrize(("shape", "target", "ignored"), LOSSES)
def test_class_parallel_alone_is_cross_entropy(shape: tuple[int, int], target: list[int], ignored: int) -> None:
    logits, targets = t(*shape), torch.tensor(target, dtype=torch.int64)
    found = kernels.class_parallel(logits, targets, ignored, 0, Alone())
    expected = F.cross_entropy(logits, targets, ignore_index=ignored, reduction="sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_a_second_backward_pass_of_class_parallel_is_refused() -> None:
    logits = t(4, 6)
    found = kernels.class_parallel(logits, torch.tensor([0, 1, 2, 3]), -100, 0, Alone())
    torch.autograd.grad(found, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found, logits)


def test_class_parallel_of_half_precision_is_computed_in_single() -> None:
    logits = (t(4, 6) * 20).detach().to(torch.bfloat16)
    found = kernels.class_parallel(logits, torch.tensor([0, 1, 2, 3]), -100, 0, Alone())
    expected = F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3]), reduction="sum")
    assert found.dtype is torch.bfloat16 and abs(float(found) - float(expected)) < 0.01 * float(expected)
