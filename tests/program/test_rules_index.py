from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rule_cases import Row, call, ints, letters_of, mask, name_of, t
from whalepy.program import functional_ops

a = torch.ops.aten

# call -> letters that its rule leaves free; None: no rule, so it runs replicated
ROWS: list[Row] = [
    (lambda: call(a.embedding.default, t(9, 4), ints(9, 3, 4), 2), "v d .1 .0"),
    (lambda: call(a.embedding.default, t(9, 4), ints(9, 5)), "v d .0"),
    (lambda: call(a.embedding.default, t(9, 4), ints(9, 5), -1, True), None),
    (lambda: call(a.embedding.default, t(9, 4), ints(9, 5), -1, False, True), None),
    (lambda: call(a.embedding.default, t(9, 4), ints(9, 5), 0), "v d .0"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [ints(4, 7)]), "b c i0"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [None, ints(6, 3, 2)]), "a c i0 i1"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [ints(4, 7), ints(6, 7)]), "c i0"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [ints(4, 7), None, ints(5, 7)]), "b i0"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [None, ints(6, 3, 1), ints(5, 4)]), "a i0 i1"),
    (lambda: call(a.index.Tensor, t(4, 6, 5), [None, None, ints(5, 2)]), "a b i0"),
    (lambda: call(a.index_select.default, t(4, 6, 5), 1, ints(6, 3)), "a c i"),
    (lambda: call(a.gather.default, t(4, 6, 5), 1, ints(6, 4, 3, 5)), "a c b"),
    (lambda: call(a.gather.default, t(4, 6, 5), 1, ints(6, 2, 3, 5)), "c b"),
    (lambda: call(a.gather.default, t(4, 6, 5), -1, ints(5, 4, 6, 5)), "a b c"),
    (lambda: call(a.take_along_dim.default, t(4, 6, 5), ints(6, 4, 3, 5), 1), "a c b"),
    (lambda: call(a.take_along_dim.default, t(4, 6, 5), ints(6, 1, 3, 5), 1), None),
    (lambda: call(a.scatter.src, t(4, 6, 5), 1, ints(6, 4, 1, 5), t(4, 1, 5)), "a c"),
    (lambda: call(a.scatter.value, t(4, 6, 5), 1, ints(6, 4, 3, 5), 2.0), "a c"),
    (lambda: call(a.scatter.src, t(4, 6, 5), 1, ints(6, 2, 1, 5), t(2, 1, 5)), "c"),
    (lambda: call(a.scatter_add.default, t(4, 6, 5), 1, ints(6, 4, 3, 5), t(4, 3, 5)), "a c i"),
    (lambda: call(a.scatter_add.default, t(4, 6, 5), 0, ints(4, 8, 6, 5), t(8, 6, 5)), "b c i"),
    (lambda: call(a.index_add.default, t(4, 6, 5), 1, ints(6, 7), t(4, 7, 5), alpha=2), "a c i"),
    (lambda: call(a.index_add.default, t(5), 0, ints(5, 7), t(7)), "i"),
    (lambda: call(a.index_fill.int_Scalar, t(4, 6, 5), 1, ints(6, 3), 2.0), "a c"),
    (lambda: call(a.index_fill.int_Tensor, t(4, 6, 5), 1, ints(6, 3), t()), "a c"),
    (lambda: call(a.index_copy.default, t(4, 6, 5), 1, torch.tensor([3, 1]), t(4, 2, 5)), "a c"),
    (lambda: call(a.slice_scatter.default, t(4, 6, 5), t(4, 3, 5), 1, 1, 4), "a c"),
    (lambda: call(a.select_scatter.default, t(4, 6, 5), t(4, 5), 1, 2), "a c"),
    (lambda: call(a.one_hot.default, ints(5, 3, 4), 5), ".1 .0"),
    (lambda: call(a.searchsorted.Tensor, torch.arange(5.0), t(3, 4).float()), ".1 .0"),
    (lambda: call(a.bucketize.Tensor, t(3, 4).float(), torch.arange(5.0)), ".1 .0"),
    (lambda: call(a.masked_scatter.default, t(4, 6, 5), mask(4, 6, 5), t(120)), None),
    (lambda: call(a.index_put.default, t(4, 6, 5), [ints(4, 2)], t(2, 6, 5)), None),
    (lambda: call(a.embedding_bag.default, t(9, 4), ints(9, 6), torch.tensor([0, 3])), None),
    (lambda: call(functional_ops.bags, t(9, 4), ints(9, 5, 3), False), "v d b"),
    (lambda: call(functional_ops.bags, t(9, 4), ints(9, 5, 3), True), "v d b"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "letters"), ROWS, ids=name_of)
def test_split_run_and_recombined_equals_the_operator(row: Callable[[], Any], letters: str | None) -> None:
    assert letters_of(row) == letters
