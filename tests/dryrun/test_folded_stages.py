"""A model in stages with most of its blocks left out gives the figures of the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests.dryrun.studies import chain, ids
from whalepy.dryrun.beyond import adds_in_stages
from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.chosen import forced as search
from whalepy.dryrun.forced import Forced
from whalepy.dryrun.grown import grown
from whalepy.dryrun.pipeline import PipelineCandidate, PipelineTried
from whalepy.dryrun.staged import Staged, stages_of, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.forecast import StageForecast
from whalepy.planner.schedule.actions import COMPUTES
from whalepy.primitives import scopes_on
from whalepy.runtime.build import Recipe

WIDTH, LENGTH, ROWS = 128, 64, 8
Make = Callable[[int], tuple[nn.Module, Any]]


def gpt2(layers: int) -> tuple[nn.Module, Any]:
    """A small GPT-2, whose head is its embedding."""
    import transformers

    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_head": 4, "n_layer": layers, "n_positions": LENGTH, "vocab_size": 256}
    config = transformers.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config), _tokens()


def llama(layers: int) -> tuple[nn.Module, Any]:
    """A small Llama."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=WIDTH, intermediate_size=4 * WIDTH, vocab_size=256,
        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config), _tokens()


def _tokens() -> dict[str, torch.Tensor]:
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "labels": tokens}


def plain(layers: int) -> tuple[nn.Module, Any]:
    """A chain whose head is its embedding."""
    return chain(layers, tied=True), ids()


PATHS: dict[Make, str] = {gpt2: "transformer.h", llama: "model.layers", plain: "blocks"}


@dataclass(frozen=True)
class Case:
    """A model whose blocks are cut at some places, on some devices."""

    make: Make
    bounds: Sequence[int]
    cluster: str
    outer: Sequence[Any] = ()
    inner: Callable[[], Sequence[Any]] = tuple
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtype: torch.dtype = torch.float32
    each: bool = False
    """Whether each block has scopes of its own inside its stage."""

    def model(self) -> tuple[nn.Module, Any]:
        """Annotated, with one batch."""
        model, batch = self.make(self.bounds[-1])
        model = model.to(self.dtype)
        scopes: dict[str, Any] = {"": list(self.outer)} if self.outer else {}
        for a, b in pairwise(self.bounds):
            stage, shared = whalepy.stage(), self.inner()
            for k in range(a, b):
                scopes[f"{PATHS[self.make]}.{k}"] = [stage, *(self.inner() if self.each else shared)]
        return whalepy.annotate(model, scopes), batch


def split() -> Sequence[Any]:
    return [whalepy.split(2)]


V100 = "V100-SXM2-32GB"
CASES = {
    "GPT-2, 3 uneven": Case(gpt2, (0, 2, 8, 12), f"3x{V100}", options={"microbatches": 5}),
    "Llama, split inside": Case(llama, (0, 4, 9), f"4x{V100}", inner=split, options={"microbatches": 2}),
    "Llama, a split per block": Case(
        llama, (0, 4, 9), f"4x{V100}", inner=split, options={"microbatches": 2}, each=True
    ),
    "Llama, replicas around": Case(
        llama, (0, 4, 8), f"4x{V100}", outer=[whalepy.replicate(2, shares=(3, 1))], options={"microbatches": 2}
    ),
    "2 even": Case(plain, (0, 5, 10), f"2x{V100}", options={"microbatches": 4}),
    "gpipe, full": Case(plain, (0, 4, 10), f"2x{V100}", options={"schedule": "gpipe", "recompute": "full"}),
    "zero-bubble": Case(plain, (0, 4, 8), f"2x{V100}", options={"schedule": "zero-bubble", "microbatches": 4}),
    "zero-bubble, full": Case(plain, (0, 4, 8), f"2x{V100}", options={"schedule": "zero-bubble", "recompute": "full"}),
    "zero-bubble, selective": Case(
        plain, (0, 4, 8), f"2x{V100}", options={"schedule": "zero-bubble", "recompute": "selective"}
    ),
    "interleaved": Case(plain, (0, 2, 6, 11, 12), f"2x{V100}", options={"schedule": "interleaved:2"}),
    "4 stages, selective": Case(plain, (0, 4, 5, 9, 12), f"4x{V100}", options={"recompute": "selective"}),
    "kept in float32": Case(plain, (0, 6, 12), f"2x{V100}", options={"microbatches": 4}, dtype=torch.bfloat16),
    "processors": Case(plain, (0, 5, 10), "2xcpu", options={"microbatches": 4}),
}


def tried_of(case: Case, *, fold: bool) -> tuple[PipelineTried, tuple[StageForecast, ...], dict[str, float]]:
    """The pipeline, what is told of its stages, and its figures."""
    model, batch = case.model()
    with folded(model, fold=fold, least=LEAST_IN_STAGES) as blocks:
        assert len(blocks.folds) == (sum(b - a > 3 for a, b in pairwise(case.bounds)) if fold else 0)
        study = Study.of(Recipe(model), batch, "adamw", blocks, master=case.dtype == torch.bfloat16)
        tried = tried_in_stages(study, ClusterSpec.load(case.cluster), Options(**case.options), Staged())
        return tried, stages_of(tried), _figures(tried)


def candidate_of(tried: PipelineTried) -> PipelineCandidate:
    assert isinstance(tried.candidate, PipelineCandidate)
    return tried.candidate


def _figures(tried: PipelineTried) -> dict[str, float]:
    candidate = candidate_of(tried)
    found = {"step": tried.step_s}
    for rank in tried.ranks:
        work = candidate.work(rank, 0)
        found |= {f"optimizer of {rank}": work.optimizer, f"busy {rank}": tried.played.tracks[rank].busy_s}
        for (_, held, act), action in zip(candidate.held(rank), candidate.actions[rank], strict=True):
            found[f"held before {action} of {rank}"] = held
            if action.op != "REDUCE":  # it holds buckets of up to 25 MiB, which small models never fill
                found[f"peak in {action} of {rank}"] = held + act.peak
            if action.op in COMPUTES:
                found[f"seconds of {action} of {rank}"] = candidate.seconds(action)
    return found


def _exact(tried: PipelineTried, rank: int) -> tuple[int, ...]:
    candidate = candidate_of(tried)
    work = candidate.work(rank, 0)
    return work.flops, work.parameters, work.gradients, work.inputs, work.buffers


LATE = {"kept in float32", "processors"}
"""Parameters are updated, or their gradients cast, one by one: fewer and longer ones where folded."""


@pytest.mark.parametrize("name", CASES)
def test_folded_stages_do_what_whole_ones_do(name: str) -> None:
    (short, told, own), (whole, all_told, all_own) = (tried_of(CASES[name], fold=fold) for fold in (True, False))
    for rank in whole.ranks:
        assert _exact(short, rank) == _exact(whole, rank)
    for one, other in zip(told, all_told, strict=True):
        assert (one.modules, one.parameters, one.flops) == (other.modules, other.parameters, other.flops)
        assert one.sends_bytes == other.sends_bytes
    if name in LATE:
        assert own.pop("step") == pytest.approx(all_own.pop("step"), rel=0.04)
        own, all_own = ({k: v for k, v in found.items() if k[:4] != "busy"} for found in (own, all_own))
    assert own == pytest.approx(all_own, rel=0.01)


# -- without another capture


def _stages(case: Case) -> dict[str, Any]:
    return dict(scopes_on(case.model()[0]))


@pytest.mark.parametrize("name", ["2 even", "zero-bubble", "interleaved", "4 stages, selective"])
@pytest.mark.parametrize("fold", [True, False])
def test_what_grows_from_three_blocks_is_what_a_capture_gives(name: str, fold: bool) -> None:
    case = CASES[name]
    model, batch = case.make(case.bounds[-1])
    with folded(model) as blocks:
        base = Study.of(Recipe(model), batch, "adamw", blocks)
    whalepy.annotate(model, _stages(case))
    with folded(model, fold=fold, least=LEAST_IN_STAGES) as blocks:
        found = grown(base, blocks, scopes_on(model))
        captured = Study.of(Recipe(model), batch, "adamw", blocks)
    assert found is not None and found.identity(None) == captured.identity(None)
    names = [[place.name for place in study.program.captured.placeholders] for study in (found, captured)]
    assert names[0] == names[1]


def test_a_model_of_transformers_grows_too() -> None:
    """Its captures keep literals that nothing reads, which are not grown: figures are compared."""
    case = CASES["Llama, split inside"]
    model, batch = case.make(case.bounds[-1])
    with folded(model) as blocks:
        base = Study.of(Recipe(model), batch, "adamw", blocks)
    whalepy.annotate(model, _stages(case))
    with folded(model, least=LEAST_IN_STAGES) as blocks:
        study = grown(base, blocks, scopes_on(model))
        assert study is not None
        own = tried_in_stages(study, ClusterSpec.load(case.cluster), Options(**case.options), Staged())
        found = stages_of(own), _figures(own)
    _, told, figures = tried_of(case, fold=True)
    assert found == (told, figures)


class Skipping(nn.Module):
    """Every block reads what the first one gave too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x + first)
        return x.pow(2).sum()


def test_blocks_that_read_the_first_one_do_not_grow() -> None:
    with torch.device("meta"):
        model, batch = Skipping(), (torch.empty(4, 8),)
    with folded(model) as blocks:
        base = Study.of(Recipe(model), batch, "adamw", blocks)
    with folded(model, fold=False) as blocks:
        assert grown(base, blocks, {}) is None


def forced_of(layers: int, stages: int) -> tuple[nn.Module, Forced]:
    """A chain, and how to put it in stages."""
    model, batch = plain(layers)
    with folded(model) as blocks:
        return model, Forced(Study.of(Recipe(model), batch, "adamw", blocks), Options(stages=stages))


@pytest.mark.parametrize("cards", [2, 3])
def test_stages_are_cut_anew_for_other_devices(cards: int) -> None:
    """As they would be if the model were annotated so."""
    model, forced = forced_of(10, 3)
    cluster = ClusterSpec.load(f"{cards}x{V100}")
    whalepy.annotate(model, {"blocks.*": whalepy.stage()})  # what stands on it is of no matter
    found = forced.on(cluster, 3)
    assert found is not None and len(model.get_submodule("blocks")._modules) == 10
    told = [candidate_of(found).plan.stages[k].rank_of for k in range(cards)]
    assert told == [(k,) for k in range(cards)]
    other, batch = plain(10)
    with folded(model, scopes={}):
        ways = search(forced.base, cluster, Options(stages=cards))
        staged, options = ways.staged(ways.choices[0])
    whalepy.annotate(other, staged.scopes)
    with folded(other, fold=False) as blocks:
        tried = tried_in_stages(Study.of(Recipe(other), batch, "adamw", blocks), cluster, options, staged)
        assert found.step_s == pytest.approx(tried.step_s, rel=0.01)
        assert found.filled == pytest.approx(tried.filled, rel=0.01)
    assert forced.on(ClusterSpec.load(f"1x{V100}"), 3) is None


def test_what_each_device_adds_to_stages() -> None:
    """Three stages without one of three equal cards are two."""
    _, forced = forced_of(9, 3)
    best, two = (forced.on(ClusterSpec.load(f"{count}x{V100}"), 3) for count in (3, 2))
    assert best is not None and two is not None
    seen: list[ClusterSpec] = []

    def without(others: ClusterSpec) -> PipelineTried | None:
        seen.append(others)
        return forced.on(others, 3)

    added = adds_in_stages(best, without)
    assert len(seen) == 1 and added == dict.fromkeys(range(3), 1 - best.step_s / two.step_s)


# -- stages that do the same


ALIKE = {
    "folded": (Case(plain, (0, 2, 6, 11, 13), f"4x{V100}", options={"microbatches": 5}), 3),
    "one of them short": (Case(plain, (0, 2, 6, 8, 10), f"4x{V100}", options={"microbatches": 5}), 4),
    "zero-bubble": (Case(plain, (0, 2, 4, 6, 8), f"4x{V100}", options={"schedule": "zero-bubble"}), 3),
}


@pytest.mark.parametrize("name", ALIKE)
def test_stages_that_differ_in_their_repeats_are_rehearsed_once(name: str) -> None:
    case, runs = ALIKE[name]
    model, batch = case.model()
    with folded(model, least=LEAST_IN_STAGES) as blocks:
        study = Study.of(Recipe(model), batch, "adamw", blocks)
        candidate = candidate_of(
            tried_in_stages(study, ClusterSpec.load(case.cluster), Options(**case.options), Staged())
        )
        assert len(candidate.recorded) == runs
        for rank in candidate.plan.ranks:
            assert candidate._recorded_actions(rank) == candidate.run(rank)
