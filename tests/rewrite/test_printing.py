from __future__ import annotations

import re

import pytest
import torch

import whalepy
from tests import models
from tests.block import MEGATRON, block
from tests.golden import Golden
from tests.programs import built_for, program_of, text_for
from whalepy.program.layout import Sharded
from whalepy.program.options import Place
from whalepy.program.printing import axes_text, folded, scopes_text
from whalepy.rewrite.explain import explain_text
from whalepy.rewrite.printing import bytes_text, layout_text, level_names
from whalepy.runtime.build import Analysed


@pytest.fixture(scope="module")
def made() -> Analysed:
    return built_for(*block(), speeds=(1.0,) * 4, orders=MEGATRON)


def test_program_of_one_block(made: Analysed, golden: Golden) -> None:
    golden("block_program", text_for(made, rank=1))


def test_scopes_of_one_block(made: Analysed, golden: Golden) -> None:
    golden("block_scopes", scopes_text(made.program))


def test_axes_of_gpt2(golden: Golden) -> None:
    model, batches = models.gpt2(layers=2)
    golden("gpt2_axes", axes_text(program_of(model, batches[0])))


def test_blocks_that_differ_are_not_folded() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4), torch.nn.Linear(4, 6))
    program = program_of(_Mean(model), (torch.randn(3, 4),))
    assert axes_text(program).splitlines() == [
        "inner.*.weight  (*.weight:0, *.weight:1)",  # 6 x 4
        "inner.*.bias    (*.weight:0)  x2",  # 6
        "inner.*.weight  (*.weight:0, *.weight:0)",  # 4 x 6
        "inner.*.bias    (*.weight:0)",  # 4
        "inner.*.weight  (*.weight:0, *.weight:0)",  # 6 x 4
        "where *.weight:0 = 6 or 4, *.weight:1 = 4",
    ]


class _Mean(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).mean()


def lines_of(made: Analysed, rank: int, pattern: str) -> list[str]:
    return [line for line in text_for(made, rank).splitlines() if re.search(pattern, line)]


def test_ranks_differ_in_their_local_shapes_only(made: Analysed) -> None:
    texts = [text_for(made, rank).splitlines()[3:] for rank in range(4)]
    without_numbers = {re.sub(r"\b[\d.]+ (B|KiB)|(?<=\[)[\d, ]+(?=\])", "", "\n".join(text)) for text in texts}
    assert len(without_numbers) == 1
    assert len({"\n".join(text) for text in texts}) == 4


@pytest.mark.parametrize(("rank", "rows", "heads"), [(0, 4, 3), (1, 4, 1), (2, 2, 3), (3, 2, 1)])
def test_shapes_are_those_of_the_rank(made: Analysed, rank: int, rows: int, heads: int) -> None:
    (attention,) = lines_of(made, rank, "whalepy.attention")
    assert f"# f32[{rows}, {heads}, 5, 4] (S(0.0), S(1.0))" in attention


def test_a_bridge_says_what_it_sends(made: Analysed) -> None:
    # 4 rows x 5 x 16 f32 are 1280 bytes; an all-reduce over two ranks sends 2 x 1/2 of them
    (first, *_) = lines_of(made, 0, r"whalepy.bridge\(.* P -> R, level 1 split\)")
    assert first.endswith("sends 1.2 KiB forward, 0 B backward")
    (first, *_) = lines_of(made, 0, r"whalepy.retype\(.* R -> B, level 1 split\)")
    assert first.endswith("sends 0 B forward, 1.2 KiB backward")


def test_nothing_of_torch_is_in_the_text(made: Analysed) -> None:
    assert not re.search(r"torch|_default|_tensor|getitem|built-in|<function|device", text_for(made, 0))


def test_every_bridge_of_the_graph_is_printed_once(made: Analysed) -> None:
    moved = [node.name for node in made.rewritten.graph.graph.nodes if "move" in node.meta]
    printed = lines_of(made, 0, r" = whalepy\.(bridge|retype)\(")
    assert len(printed) == len(moved) == len({line.split(" = ")[0] for line in printed})


def test_a_frozen_parameter_sends_no_gradient() -> None:
    model, example = block()
    model.up.weight.requires_grad_(False)
    lines = text_for(built_for(model, example, speeds=(1.0,) * 4, orders=MEGATRON), 0).splitlines()
    assert "up.weight = parameter  # f32[18, 16] (R, S(0.0))  frozen" in lines


def test_names_that_fx_spells_anew() -> None:
    model = _Mean(torch.nn.Sequential())
    model.inner.LayerNorm = torch.nn.LayerNorm(4)
    lines = text_for(built_for(model, (torch.randn(8, 4),), {"": whalepy.replicate(2)}), 0).splitlines()
    assert "inner.LayerNorm.weight = parameter  # f32[4] (B)  sends 16 B of gradient" in lines


def test_new_values_of_buffers_are_printed() -> None:
    model = _Mean(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)))
    text = text_for(built_for(model, (torch.randn(8, 4),), {"": whalepy.replicate(2)}), 0)
    assert re.search(r"^inner\.1\.running_mean <- \S+$", text, re.MULTILINE)
    assert re.search(r"^return \S+$", text, re.MULTILINE)


def test_two_shards_of_one_place_show_their_shares() -> None:
    place = Place(0, 0, 7)
    assert layout_text(("B", Sharded(place, 0), "P")) == "(B, S(0.0), P)"


@pytest.mark.parametrize(
    ("scopes", "names"),
    [
        ({}, ("implicit replicate",)),
        ({"": lambda: whalepy.replicate(2)}, ("implicit replicate", "replicate")),
        ({"0": lambda: whalepy.replicate(4), "1": lambda: whalepy.split(4)}, ("replicate or split",)),
        ({"": lambda: whalepy.replicate(2), "0": lambda: whalepy.split(2)}, ("replicate", "split")),
    ],
)
def test_levels_are_named_after_their_owners(scopes: dict[str, object], names: tuple[str, ...]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    inner = {f"inner.{path}".removesuffix("."): make() for path, make in scopes.items()}  # type: ignore[operator]
    built = built_for(_Mean(model), (torch.randn(4, 8),), inner, (1.0,) * 4)
    assert level_names(built.chains, 4) == names


BYTES = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 2**20, "1.5 GiB"), (5000 * 2**30, "5000.0 GiB")]


@pytest.mark.parametrize(("count", "text"), BYTES)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("h.0.mlp.weight", "h.*.mlp.weight"), ("0.weight", "*.weight"), ("h.10", "h.*"), ("conv1.weight", "conv1.weight")],
)
def test_blocks_are_folded(name: str, text: str) -> None:
    assert folded(name) == text


@torch.library.custom_op("whalepy_tests::reversed", mutates_args=())
def reversed_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


@reversed_rows.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class _Unruled(torch.nn.Module):
    """An operator without a rule, twice on one line; and a softmax, which needs the dim whole by which its operand is
    cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + reversed_rows(x.detach())
        hidden = self.up(x)
        return self.down(hidden.softmax(-1)).mean()


def test_what_runs_whole_is_explained() -> None:
    made = built_for(_Unruled(), (torch.randn(4, 8),), {"": whalepy.split(2)}, orders={(0, 0): ("up.weight:0",)})
    where = {op.target: op.where for op in made.program.operators}
    at = next(chain[0].at for chain in made.chains if chain)
    cut = "it cannot be cut along the axis by which its operand is sharded"
    assert explain_text(made.program, made.decisions, made.chains).splitlines() == [
        f"split(2) ({at}) on level 0 is cut along up.weight:0",
        f"whalepy_tests.reversed x2 ({where['whalepy_tests.reversed']}) runs whole, 256 B, on level 0 split: "
        "it has no rule",
        f"aten.softmax ({where['aten.softmax']}) runs whole, 128 B, on level 0 split: {cut}",
    ]
