from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers the product of groups

from tests.rule_cases import Row, call, ints, letters_of, name_of, positive_definite, t
from whalepy.program.functional_ops import grouped_linear

a = torch.ops.aten

# call -> letters that its rule leaves free; None: no rule, so it runs replicated
ROWS: list[Row] = [
    (lambda: call(a.linear.default, t(5, 6, 7), t(4, 7), t(4)), ".1 .0 k n"),
    (lambda: call(a.linear.default, t(7), t(4, 7)), "k n"),
    (lambda: call(a.linear.default, t(3, 7), t(4, 7)), ".0 k n"),
    (lambda: call(a.mm.default, t(5, 6), t(6, 7)), "m k n"),
    (lambda: call(grouped_linear, t(5, 6), t(3, 6, 4), ints(3, 5), "transformers.grouped_mm_fallback"), "m k n"),
    (lambda: call(a.bmm.default, t(3, 5, 6), t(3, 6, 4)), "b m k n"),
    (lambda: call(a.baddbmm.default, t(3, 5, 4), t(3, 5, 6), t(3, 6, 4), beta=2, alpha=3), "b m n k"),
    (lambda: call(a.baddbmm.default, t(1, 5, 1), t(3, 5, 6), t(3, 6, 4)), "m b k n"),
    (lambda: call(a.addbmm.default, t(5, 4), t(3, 5, 6), t(3, 6, 4)), "m n b k"),
    (lambda: call(a.mv.default, t(5, 6), t(6)), "m k"),
    (lambda: call(a.dot.default, t(5), t(5)), "k"),
    (lambda: call(a.vdot.default, t(5), t(5)), "k"),
    (lambda: call(a.outer.default, t(5), t(6)), "m n"),
    (lambda: call(a.ger.default, t(5), t(6)), "m n"),
    (lambda: call(a.addmv.default, t(5), t(5, 6), t(6)), "m k"),
    (lambda: call(a.addr.default, t(5, 6), t(5), t(6), beta=2), "m n"),
    (lambda: call(a.addmm.default, t(4), t(5, 6), t(6, 4)), "n m k"),
    (lambda: call(a.addmm.default, t(5, 4), t(5, 6), t(6, 4), beta=0.5), "m n k"),
    (lambda: call(a.addmm.default, t(5, 1), t(5, 6), t(6, 4)), "m k n"),
    (lambda: call(a.addmm.default, t(), t(5, 6), t(6, 4)), "m k n"),
    (lambda: call(a.matmul.default, t(5), t(5)), "k"),
    (lambda: call(a.matmul.default, t(3, 5), t(5)), "m k"),
    (lambda: call(a.matmul.default, t(5), t(5, 4)), "k n"),
    (lambda: call(a.matmul.default, t(2, 3, 5, 6), t(6, 4)), ".1 .0 m k n"),
    (lambda: call(a.matmul.default, t(2, 3, 5, 6), t(3, 6, 4)), ".1 .0 m k n"),
    (lambda: call(a.matmul.default, t(5, 6), t(3, 6, 4)), "m k .0 n"),
    (lambda: call(a.matmul.default, t(2, 1, 5, 6), t(3, 6, 4)), ".1 m k .0 n"),
    (lambda: call(a.matmul.default, t(3, 5, 6), t(6)), ".0 m k"),
    (lambda: call(a.matmul.default, t(5), t(3, 5, 4)), None),
    (lambda: call(a.inner.default, t(3, 5), t(4, 5)), "m k n"),
    (lambda: call(a.inner.default, t(5), t(4, 5)), "k n"),
    (lambda: call(a.einsum.default, "bhqd,bhkd->bhqk", [t(2, 3, 4, 5), t(2, 3, 6, 5)]), "b h q d k"),
    (lambda: call(a.einsum.default, "ij,jk->ki", [t(3, 4), t(4, 5)]), "i j k"),
    (lambda: call(a.einsum.default, "bIj,bi->bI", [t(3, 4, 5), t(3, 6)]), "b i1x j i"),
    (lambda: call(a.einsum.default, "ij->j", [t(3, 4)]), "i j"),
    (lambda: call(a.einsum.default, "ii->i", [t(3, 3)]), None),
    (lambda: call(a.einsum.default, "...i,ij->...j", [t(2, 3, 4), t(4, 5)]), ".1 .0 i j"),
    (lambda: call(a.einsum.default, "...qhd,...khd->...hqk", [t(2, 3, 4, 2, 5), t(3, 6, 2, 5)]), ".1 .0 q h d k"),
    (lambda: call(a.einsum.default, "b...i,b...->b...i", [t(2, 3, 4), t(2, 1)]), "b .0 i"),
    (lambda: call(a.einsum.default, "...i,ij->j", [t(3, 4), t(4, 5)]), None),
    (lambda: call(a.einsum.default, "ab,bc,cd->ad", [t(3, 4), t(4, 5), t(5, 6)]), "a b c d"),
    (lambda: call(a.bilinear.default, t(3, 4), t(3, 5), t(6, 4, 5), t(6)), ".0 o"),
    (lambda: call(a.cdist.default, t(2, 4, 3), t(2, 5, 3)), ".0 p r"),
    (lambda: call(a.cdist.default, t(4, 3), t(5, 3), 1.0), "p r"),
    (lambda: call(a.linalg_inv.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.linalg_det.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.linalg_matrix_exp.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.linalg_slogdet.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.logdet.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.linalg_cholesky.default, positive_definite(4, 3, 3)), ".0"),
    (lambda: call(a.linalg_matrix_power.default, t(4, 3, 3), 2), ".0"),
    (lambda: call(a.linalg_solve_triangular.default, positive_definite(4, 3, 3), t(4, 3, 2), upper=True), ".0"),
    (lambda: call(a.conv1d.default, t(3, 4, 8), t(6, 4, 3), t(6)), "n c o"),
    (lambda: call(a.conv2d.default, t(3, 4, 6, 6), t(8, 4, 3, 3), t(8)), "n c o"),
    (lambda: call(a.conv2d.default, t(3, 4, 6, 6), t(8, 4, 3, 3), None, [2, 1], [1, 1]), "n c o"),
    (lambda: call(a.conv2d.padding, t(3, 4, 6, 6), t(8, 4, 3, 3), t(8), [1, 1], "same"), "n c o"),
    (lambda: call(a.conv2d.default, t(4, 6, 6), t(8, 4, 3, 3), t(8)), "c o"),
    (lambda: call(a.conv3d.default, t(3, 4, 4, 4, 4), t(5, 4, 2, 2, 2), t(5)), "n c o"),
    (lambda: call(a.conv2d.default, t(3, 8, 6, 6), t(12, 2, 3, 3), t(12), [1, 1], [0, 0], [1, 1], 4), "n g C"),
    (lambda: call(a.conv2d.default, t(3, 5, 6, 6), t(5, 1, 3, 3), t(5), [1, 1], [1, 1], [1, 1], 5), "n g"),
    (lambda: call(a.conv2d.default, t(3, 5, 6, 6), t(10, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 5), "n g"),
    (lambda: call(a.conv1d.default, t(3, 5, 6), t(5, 1, 3), t(5), [1], [2], [1], 5), "n g"),
    (lambda: call(a.conv2d.padding, t(3, 5, 6, 6), t(5, 1, 3, 3), t(5), [1, 1], "same", [1, 1], 5), "n g"),
    (lambda: call(a.conv1d.default, t(5, 6), t(5, 1, 3), t(5), [1], [2], [1], 5), "g"),
    (lambda: call(a.conv_transpose1d.default, t(3, 4, 8), t(4, 6, 3), t(6)), "n c o"),
    (lambda: call(a.conv_transpose2d.input, t(3, 4, 5, 5), t(4, 6, 3, 3), t(6), [2, 2]), "n c o"),
    (lambda: call(a.conv_transpose2d.input, t(3, 4, 5, 5), t(4, 3, 3, 3), t(6), [2, 2], [0, 0], [0, 0], 2), None),
    (
        lambda: call(
            a.convolution.default, t(3, 4, 6, 6), t(8, 4, 3, 3), t(8), [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        ),
        "n c o",
    ),
    (
        lambda: call(
            a.convolution.default, t(3, 4, 6, 6), t(4, 8, 3, 3), t(8), [1, 1], [0, 0], [1, 1], True, [0, 0], 1
        ),
        "n c o",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "letters"), ROWS, ids=name_of)
def test_split_run_and_recombined_equals_the_operator(row: Callable[[], Any], letters: str | None) -> None:
    assert letters_of(row) == letters
