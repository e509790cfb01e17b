"""A model with most of its blocks left out gives the figures of the whole one, and is whole again afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.dryrun.studies import EXACT, LENGTH, ROWS, VOCABULARY, WIDTH, Block, Case, Chain, cards, chain
from tests.dryrun.studies import folded_and_whole as both
from whalepy.dryrun.blocks import Blocks, folded, module_of
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Savings, Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.work import Fold
from whalepy.primitives import scopes_on
from whalepy.runtime.build import Recipe

EVERY = ((1, Savings()), (3, Savings(1, "attention")), (3, Savings(2, "selective")), (1, Savings(3, "full")))
FEW: tuple[Case, ...] = ((2, Savings(3, "selective")),)


def check(figures: Sequence[tuple[dict[str, float], dict[str, float]]], near: float = 0.01) -> None:
    for short, whole in figures:
        assert {name: short[name] for name in EXACT} == {name: whole[name] for name in EXACT}
        assert short == pytest.approx(whole, rel=near)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)])
def test_every_saving_in_microbatches(mesh: tuple[int, int]) -> None:
    # Four rows per replica in three microbatches: 2, 1, 1.
    check(both(chain(6), cards(mesh), levels_of(*mesh), EVERY))


def test_what_is_kept_at_the_end_of_a_step_with_full_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whalepy.runtime.reduction.bucket_bytes", lambda total, delay: 2**13)
    peaks: list[int] = []
    for fold in (True, False):
        model = chain(9)
        with folded(model, fold=fold) as blocks:
            study, cluster = Study.of(Recipe(model), _tokens(), "adamw", blocks), cards((2, 1))
            made = [study.candidate(levels_of(2, 1), cluster, cluster.speeds(), 1, Savings(z)) for z in (0, 1, 3)]
            peaks += [candidate.work(0, 1).peak for candidate in made]
    assert peaks[:3] == pytest.approx(peaks[3:], rel=0.02)


def _tokens() -> dict[str, Tensor]:
    return {"ids": torch.zeros(2, 4, dtype=torch.long, device="meta")}


def test_layers_that_alternate() -> None:
    with torch.device("meta"):
        model = Chain([Block(hidden=WIDTH if k % 2 else 3 * WIDTH) for k in range(10)])
    with folded(model) as blocks:
        assert blocks.folds == (Fold(0, 2, 5),) and len(model.blocks) == 6
    check(both(model, cards((2, 1)), levels_of(2, 1), FEW))


def test_layers_of_their_own_shape_are_all_run() -> None:
    with torch.device("meta"):
        model = Chain([Block(hidden=WIDTH + 2 * k) for k in range(6)])
    with folded(model) as blocks:
        assert not blocks.folds and len(model.blocks) == len(blocks.paths) == 6


def test_the_first_and_the_last_layer_may_differ() -> None:
    with torch.device("meta"):
        model = Chain([Block(hidden=WIDTH if k in (0, 6) else 2 * WIDTH) for k in range(7)])
    with folded(model) as blocks:
        assert blocks.folds == (Fold(1, 1, 5),) and len(model.blocks) == 5
    check(both(model, cards((2, 1)), levels_of(2, 1), FEW))


def test_frozen_layers() -> None:
    model = chain(6)
    for block in model.blocks:
        block.get_submodule("up").requires_grad_(False)
    model.embed.requires_grad_(False)
    check(both(model, cards((2, 1)), levels_of(2, 1), FEW))


def test_layers_frozen_below_are_no_repeats_of_those_above() -> None:
    model = chain(10)
    for block in list(model.blocks)[:5]:
        block.requires_grad_(False)
    with folded(model) as blocks:
        assert blocks.folds == (Fold(0, 1, 5), Fold(3, 1, 5))
    check(both(model, cards((2, 1)), levels_of(2, 1), FEW, folds=2))


def test_what_is_frozen_is_neither_reduced_nor_updated() -> None:
    """A large frozen head grows with no block: what is sent and updated grows as the trained blocks do."""
    model = chain(8)
    with torch.device("meta"):
        model.embed, model.head = nn.Embedding(9000, WIDTH), nn.Linear(WIDTH, 9000, bias=False)
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    check(both(model, ClusterSpec.load("2xcpu"), levels_of(2, 1), [(1, Savings())]), near=0.03)


@pytest.mark.parametrize("mesh", [(2, 1)])
def test_an_embedding_that_is_the_head(mesh: tuple[int, int]) -> None:
    check(both(chain(6, tied=True), cards(mesh), levels_of(*mesh), FEW), near=0.03)


def test_parameters_kept_in_float32_and_read_in_bfloat16() -> None:
    figures = both(chain(6).to(torch.bfloat16), cards((2, 1)), levels_of(2, 1), EVERY[2:3], master=True)
    for figure in itertools.chain(*figures):  # gradients are cast one by one: fewer and longer ones where folded
        del figure["step_s"], figure["busy_s"]
    check(figures)
    short, _ = figures[0]
    assert short["parameters"] == short["gradients"] == 4 * sum(p.numel() for p in chain(6).parameters()) / 2


def test_blocks_with_annotations() -> None:
    model = chain(6)
    whalepy.annotate(model, {"blocks.*": whalepy.split(2)})
    check(both(model, cards((2, 1)), None, ((1, Savings()),)), near=0.05)
    assert all("blocks" in path for path in scopes_on(model))


def test_processors() -> None:
    """Operators update one parameter after another, each of the folded model for several of the whole one."""
    check(both(chain(6), ClusterSpec.load("2xcpu"), levels_of(2, 1), FEW), near=0.03)


def _config(name: str, **sizes: Any) -> Any:
    """Annotations of transformers leave out the fields that all configurations have."""
    import transformers

    return getattr(transformers, name)(**sizes)


def _language_model(kind: str) -> tuple[nn.Module, Any, int]:
    import transformers

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
    tokens = {"input_ids": ids, "labels": ids}
    made: dict[str, Any] = {
        "llama": lambda: (
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    num_hidden_layers=6, hidden_size=WIDTH, intermediate_size=64, vocab_size=VOCABULARY,
                    num_attention_heads=4, num_key_value_heads=2)), tokens, 1),
        "t5": lambda: (
            transformers.T5ForConditionalGeneration(
                _config("T5Config",
                    num_layers=6, num_decoder_layers=7, d_model=WIDTH, d_kv=8, num_heads=4, d_ff=64,
                    vocab_size=VOCABULARY, decoder_start_token_id=0, dropout_rate=0.0)), tokens, 2),
        "vit": lambda: (
            transformers.ViTForImageClassification(
                _config("ViTConfig",
                    num_hidden_layers=6, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=64, image_size=16,
                    patch_size=4, num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
            {"pixel_values": torch.zeros(ROWS, 3, 16, 16, device="meta"), "labels": ids[:, 0]}, 1),
    }  # fmt: skip
    with torch.device("meta"):
        return made[kind]()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh"), [("llama", (2, 2)), ("t5", (2, 1)), ("vit", (1, 2))])
def test_models_of_transformers(kind: str, mesh: tuple[int, int]) -> None:
    model, example, folds = _language_model(kind)
    check(both(model, cards(mesh), levels_of(*mesh), ((1, Savings(3, "full")),), example=example, folds=folds), 0.03)


# -- the model is whole again


def test_the_model_is_whole_after_an_error() -> None:
    model = chain(8)
    before, keys = list(model.blocks), list(model.state_dict())
    with pytest.raises(ZeroDivisionError), folded(model):
        assert len(model.blocks) == 3
        raise ZeroDivisionError
    assert list(model.blocks) == before and list(model.state_dict()) == keys


def test_members_with_names_keep_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    model._modules = {f"layer{k}": member for k, member in enumerate(model)}
    with folded(model) as blocks:
        assert blocks.paths == tuple(model._modules) == ("layer0", "layer1", "layer2")
    assert list(model._modules) == [f"layer{k}" for k in range(6)]


class Numbered(Block):
    """A block that knows its place."""

    def __init__(self, place: int, scale: int = 1) -> None:
        super().__init__()
        self.place, self.scale = place, scale


# Reasons why a block is, or is not, a repeat of the one before.
FORMS = {
    "a number that is its place": (lambda: [Numbered(k) for k in range(6)], 1),
    "a number that is not": (lambda: [Numbered(k, k % 3 + 7) for k in range(5)], 0),
    "a number that is its place in the first three alone": (lambda: [Numbered(min(k, 2)) for k in range(6)], 0),
    "too few": (lambda: [Block() for _ in range(4)], 0),
    "another class": (lambda: [Block(), Numbered(0), Block(), Numbered(1), Block(), Block()], 0),
}  # fmt: skip


@pytest.mark.parametrize("reason", FORMS)
def test_what_is_a_repeat(reason: str) -> None:
    made, folds = FORMS[reason]
    with torch.device("meta"):
        model = Chain(made())
    with folded(model) as blocks:
        assert len(blocks.folds) == folds


def test_a_forward_that_somebody_replaced_is_no_repeat() -> None:
    model = chain(8)
    block = model.blocks[4]
    block.forward = lambda x: x  # type: ignore[method-assign]
    with folded(model) as blocks:
        assert not blocks.folds


class Picking(Chain):
    """Uses its blocks in another way than one after another."""

    def __init__(self, way: str) -> None:
        super().__init__([Block() for _ in range(6)])
        self.way = way

    def forward(self, ids: Tensor) -> Tensor:
        x, blocks = self.embed(ids), list(self.blocks)
        ways = {"all": blocks, "backwards": blocks[::-1], "every other": blocks[::2], "not the last": blocks[:-1]}
        for block in ways[self.way]:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("way", ["all", "backwards", "every other", "not the last"])
def test_blocks_stand_for_all_where_all_run_in_order(way: str) -> None:
    with torch.device("meta"):
        model = Picking(way)
    with folded(model) as blocks:
        study = Study.of(Recipe(model), _tokens(), "sgd", blocks)
        assert blocks.folds and blocks.stand_for_all(study.program.nodes) == (way == "all")


class Wrapped(nn.Module):
    """Keeps its blocks under the name that captures give the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = chain(6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


def test_a_module_called_model_is_taken_for_itself() -> None:
    model = Wrapped()
    with folded(model) as blocks:
        study = Study.of(Recipe(model), _tokens(), "sgd", blocks)
        assert blocks.paths == tuple(f"model.blocks.{k}" for k in range(3)) and blocks.folds
        found = {module_of(node) for node in study.program.nodes if node.op == "call_function"}
        assert {blocks.of(path) for path in found if path is not None} == {-1, 0, 1, 2}
        assert "model.blocks.2.mix" in found and "model" in found


def test_operators_of_the_model_itself_lie_in_no_block() -> None:
    blocks = Blocks(("model",))
    node = SimpleNamespace(meta={"nn_module_stack": {"0": ("model", nn.Module)}})
    assert module_of(node) == "" and blocks.of(module_of(node) or "") == -1  # type: ignore[arg-type]
