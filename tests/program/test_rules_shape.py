from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rule_cases import Row, call, letters_of, name_of, t

a = torch.ops.aten

# call -> letters that its rule leaves free; None: no rule, so it runs replicated
ROWS: list[Row] = [
    (lambda: call(a.view.default, t(4, 6, 5), [4, 30]), "_"),
    (lambda: call(a.reshape.default, t(4, 6, 5), [4, 2, 3, 5]), "_"),
    (lambda: call(a.reshape.default, t(4, 6, 5), [24, 5]), "_"),
    (lambda: call(a.view.default, t(4, 6), [6, 4]), ""),
    (lambda: call(a.view.default, t(12, 5), [3, 20]), "_"),
    (lambda: call(a.view.dtype, torch.ones(4, 6), torch.int32), None),
    (lambda: call(a.flatten.using_ints, t(4, 6, 5), 1), "_"),
    (lambda: call(a.unflatten.int, t(4, 6, 5), 1, [2, 3]), "_"),
    (lambda: call(a.squeeze.dim, t(4, 1, 5), 1), "_"),
    (lambda: call(a.squeeze.default, t(4, 1, 5)), "_"),
    (lambda: call(a.unsqueeze.default, t(4, 6, 5), -1), "_"),
    (lambda: call(a.ravel.default, t(4, 6, 5)), "_"),
    (lambda: call(a.reshape.default, t(1), []), ""),
    (lambda: call(a.view_as.default, t(4, 6), t(2, 2, 6)), None),
    (lambda: call(a.permute.default, t(4, 6, 5), [2, 0, 1]), "a b c"),
    (lambda: call(a.permute.default, t(4, 6, 5), [-1, 0, 1]), "a b c"),
    (lambda: call(a.transpose.int, t(4, 6, 5), 0, -1), "a b c"),
    (lambda: call(a.t.default, t(4, 5)), "a b"),
    (lambda: call(a.mT.default, t(4, 6, 5)), "a b c"),
    (lambda: call(a.movedim.int, t(4, 6, 5), 0, 2), "a b c"),
    (lambda: call(a.movedim.intlist, t(4, 6, 5), [0, 1], [2, 0]), "a b c"),
    (lambda: call(a.swapaxes.default, t(4, 6, 5), 0, 1), "a b c"),
    (lambda: call(a.expand.default, t(4, 1, 5), [4, 3, 5]), "a c b"),
    (lambda: call(a.expand.default, t(4, 5), [3, 4, 5]), "b c a"),
    (lambda: call(a.expand.default, t(4, 1), [-1, 3]), "a b"),
    (lambda: call(a.expand_as.default, t(4, 1), t(3, 4, 5)), "b a c"),
    (lambda: call(a.broadcast_to.default, t(5), [4, 5]), "b a"),
    (lambda: call(a.slice.Tensor, t(4, 6, 5), 1, 1, 4), "a c"),
    (lambda: call(a.slice.Tensor, t(4, 6, 5), 1, 0, 6, 2), "a c"),
    (lambda: call(a.slice.Tensor, t(4, 6, 5), -1), "a b"),
    (lambda: call(a.narrow.default, t(4, 6, 5), 1, 2, 3), "a c"),
    (lambda: call(a.flip.default, t(4, 6, 5), [0, -1]), "b"),
    (lambda: call(a.roll.default, t(4, 6, 5), [1], [1]), "a c"),
    (lambda: call(a.roll.default, t(4, 6, 5), [1]), ""),
    (lambda: call(a.constant_pad_nd.default, t(4, 6, 5), [1, 2], 0.0), "a b"),
    (lambda: call(a.constant_pad_nd.default, t(4, 6, 5), [1, 2, 0, 0, 1, 1], 1.5), "b"),
    (lambda: call(a.pad.default, t(4, 6, 5), [1, 1], "reflect"), "a b"),
    (lambda: call(a.pad.default, t(4, 6, 5), [1, 1]), "a b"),
    (lambda: call(a.pad.default, t(4, 6, 5), [1, 1], "constant", 2.0), "a b"),
    (lambda: call(a.reflection_pad2d.default, t(4, 3, 5, 5), [1, 1, 1, 1]), "a b"),
    (lambda: call(a.replication_pad1d.default, t(4, 6, 5), [1, 1]), "a b"),
    (lambda: call(a.pad.default, t(4, 6, 5), [1, 1], "circular"), "a b"),
    (lambda: call(a.constant_pad_nd.default, t(4, 6, 5), [-1, 0]), "a b"),
    (lambda: call(a.select.int, t(4, 6, 5), 1, 2), "a c"),
    (lambda: call(a.select.int, t(4, 6, 5), -1, 0), "a b"),
    (lambda: call(a.unbind.int, t(4, 6, 5), 1), "a c"),
    (lambda: call(a.split.Tensor, t(4, 6, 5), 2, 1), "a b c"),
    (lambda: call(a.split.Tensor, t(4, 6, 5), 4, 1), "a c"),
    (lambda: call(a.split_with_sizes.default, t(4, 6, 5), [1, 2, 3], 1), "a c"),
    (lambda: call(a.split_with_sizes.default, t(4, 12), [6, 3, 3], 1), "a"),
    (lambda: call(a.chunk.default, t(4, 6, 5), 3, 1), "a b c"),
    (lambda: call(a.chunk.default, t(4, 6, 5), 2, -1), "a b"),
    (lambda: call(a.tensor_split.sections, t(4, 6, 5), 2, 2), "a b"),
    (lambda: call(a.split.Tensor, t(4, 6, 5), 6, 1), "a b c"),
    (lambda: call(a.cat.default, [t(4, 2), t(4, 3), t(4, 2)], 1), "a"),
    (lambda: call(a.cat.default, [t(4, 6, 5), t(4, 6, 5)], -3), "b c"),
    (lambda: call(a.cat.default, [t(0), t(4, 3)], 1), None),
    (lambda: call(a.cat.default, [t(4, 6, 5)], -3), "b c"),
    (lambda: call(a.stack.default, [t(4, 6, 5), t(4, 6, 5)], 1), "a b c"),
    (lambda: call(a.stack.default, [t(4, 6, 5), t(4, 6, 5)], -1), "a b c"),
    (lambda: call(a.stack.default, [t(), t()]), ""),
    (lambda: call(a.repeat.default, t(4, 6, 5), [2, 1, 1, 3]), "a b c"),
    (lambda: call(a.repeat.default, t(4, 1), [1, 3]), "a"),
    (lambda: call(a.tile.default, t(4, 6, 5), [2]), "a b c"),
    (lambda: call(a.tile.default, t(3, 4), [2, 3, 2]), "a b"),
    (lambda: call(a.repeat_interleave.self_int, t(4, 6, 5), 3, 1), "a b c"),
    (lambda: call(a.repeat_interleave.self_int, t(4, 6, 5), 2, -1, output_size=10), "a b c"),
    (lambda: call(a.repeat_interleave.self_int, t(4, 6, 5), 1, 0), "a b c"),
    (lambda: call(a.repeat_interleave.self_int, t(4, 1, 5), 2, 1), "a c"),  # the copies are not cut
    (lambda: call(a.repeat_interleave.self_int, t(4, 6, 5), 2), None),
    (lambda: call(a.unfold.default, t(4, 6, 5), 1, 2, 2), "a c"),
    (lambda: call(a.diagonal.default, t(3, 4, 5), 0, 0, 2), "b"),
    (lambda: call(a.diagonal.default, t(3, 4, 4), 1, -2, -1), "a"),
    (lambda: call(a.diag_embed.default, t(3, 4)), "a"),
    (lambda: call(a.diag_embed.default, t(3, 4), 0, 0, 2), "a"),
    (lambda: call(a.tril.default, t(3, 4, 5)), "a"),
    (lambda: call(a.triu.default, t(4, 5), 1), ""),
    (lambda: call(a.meshgrid.indexing, [t(3), t(4), t(5)], indexing="ij"), "a b c"),
    (lambda: call(a.meshgrid.indexing, [t(3), t(4)], indexing="xy"), "a b"),
    (lambda: call(a.meshgrid.default, [t(3), t(4)]), "a b"),
    (lambda: call(a.broadcast_tensors.default, [t(3, 1), t(4)]), ".1 .0"),
    (lambda: call(a.zeros.default, [4, 5]), "a b"),
    (lambda: call(a.full.default, [4, 5], 2.0), "a b"),
    (lambda: call(a.ones.default, [4]), "a"),
    (lambda: call(a.new_zeros.default, t(3), [4, 5]), "a b"),
    (lambda: call(a.new_full.default, t(3), [4, 5], 2.0), "a b"),
    (lambda: call(a.new_ones.default, t(3), [4]), "a"),
    (lambda: call(a.rand.default, [4, 5]), "a b"),
    (lambda: call(a.randn.default, [4]), "a"),
    (lambda: call(a.numpy_T.default, t(4, 5)), "a b"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "letters"), ROWS, ids=name_of)
def test_split_run_and_recombined_equals_the_operator(row: Callable[[], Any], letters: str | None) -> None:
    assert letters_of(row) == letters
