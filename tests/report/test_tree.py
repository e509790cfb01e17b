"""Modules as a tree."""

from __future__ import annotations

from tests import forecasts
from whalepy.planner.forecast import ModulePart
from whalepy.report.tree import tree


def test_a_tree_of_paths() -> None:
    top = tree(forecasts.MODULES, "LlamaForCausalLM")
    assert (top.name, top.parameters) == ("LlamaForCausalLM", 1_235_814_400)
    assert list(top.inside) == ["model", "lm_head"]
    layers = top.inside["model"].inside["layers"].inside["*"]
    assert (layers.name, layers.repeats, layers.parameters) == ("*", 16, 973_144_064)
    assert list(layers.inside) == ["self_attn", "mlp"]
    assert layers.inside["self_attn"].is_cut
    assert not layers.inside["mlp"].is_cut


def test_a_module_that_is_not_listed_is_the_sum_of_those_inside() -> None:
    top = tree(forecasts.MODULES, "m").inside["model"]
    assert top.part is None
    assert top.parameters == 262_668_288 + 973_144_064
    assert top.flops == 2.6e14


def test_only_so_many() -> None:
    parts = [ModulePart(f"m{k}", 1, 1, 1.0) for k in range(10)]
    assert list(tree(parts, "model", most=3).inside) == ["m0", "m1", "m2"]
