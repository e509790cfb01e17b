"""A second oracle for rules: what DTensor makes of the same operands, on a group that exists on paper only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from whalepy.program.layout import Mode, Sharded, Type, operand_type, result_type
from whalepy.runtime.one_operator import one_operator

aten = torch.ops.aten


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def placement(kind: Type) -> Any:
    if isinstance(kind, Sharded):
        return Shard(kind.place.dim) if kind.place.term == 0 else None  # DTensor cuts the leading factor only
    return Partial() if kind == "P" else Replicate()


CASES = [
    ("rows, contraction and columns", aten.mm.default, (torch.randn(4, 6), torch.randn(6, 8))),
    ("a batch of products", aten.bmm.default, (torch.randn(4, 6, 8), torch.randn(4, 8, 2))),
    ("dims that merge", aten.view.default, (torch.randn(4, 6, 8), [24, 8])),
    ("a dim that comes apart", aten.view.default, (torch.randn(24, 8), [4, 6, 8])),
    ("dims that change places", aten.transpose.int, (torch.randn(4, 6), 0, 1)),
    ("operands that broadcast", aten.add.Tensor, (torch.randn(4, 6), torch.randn(6))),
    ("a sum over a dim", aten.sum.dim_IntList, (torch.randn(4, 6), [1])),
    ("a softmax, whole along its dim", aten._softmax.default, (torch.randn(4, 6), 1, False)),
]


@pytest.mark.parametrize(("why", "op", "args"), CASES, ids=[case[0] for case in CASES])
def test_dtensor_agrees_with_every_option(mesh: DeviceMesh, why: str, op: Any, args: tuple[Any, ...]) -> None:
    one = one_operator(op, args, {})
    compared = 0
    for option in one.operator.options:
        mode = Mode("S", option)
        kinds = [operand_type(one.operator, mode, k) for k in range(len(one.operator.operands))]
        placements = [placement(kind) for kind in kinds]
        expected = placement(result_type(one.operator, mode, 0))
        if None in placements or expected is None:
            continue
        queue = iter(placements)
        given = [_placed(a, next(queue), mesh) if isinstance(a, torch.Tensor) else a for a in args]
        result = op(*given)
        assert list(result.placements) == [expected], f"{why}: {option}"
        compared += 1
    assert compared


def _placed(whole: torch.Tensor, how: Any, mesh: DeviceMesh) -> DTensor:
    local = whole.chunk(2, how.dim)[0].contiguous() if isinstance(how, Shard) else whole
    return DTensor.from_local(local, mesh, [how])
