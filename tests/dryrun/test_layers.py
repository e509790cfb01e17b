"""A description of layers is forecast as the captured model is, and its seconds are taken as they were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.dryrun.studies import NO_SAVINGS
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.described import DescribedCandidate, DescribedStudy
from whalepy.dryrun.layers import seconds_of
from whalepy.dryrun.shares import best_rows
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Savings, Study
from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.layer_profile import LayerFile, read_layers
from whalepy.runtime.build import Recipe

WIDTH, LAYERS, LENGTH, VOCABULARY, ROWS = 768, 6, 512, 50257, 16
FLOAT = 4
TOKEN = WIDTH * FLOAT
"""Bytes of one position."""
EXAMPLE = Path("examples/opt-350m.yaml")


def gpt2() -> LayerFile:
    """GPT-2 by the book: products of its matrices, and what torch's operators read, write and keep, fused attention."""
    matrices, scores = 24 * WIDTH * WIDTH, 2 * 2 * WIDTH * LENGTH / 2
    logits = VOCABULARY * FLOAT * LENGTH
    layers: list[dict[str, Any]] = [
        {
            "name": "embedding",
            "parameters": (VOCABULARY + 1024) * WIDTH,
            "output_bytes": TOKEN * LENGTH,
            "bytes": 5 * TOKEN * LENGTH,
            "operators": 3,
        },
        {
            "name": "block",
            "repeat": LAYERS,
            "parameters": 12 * WIDTH * WIDTH + 13 * WIDTH,
            # Two norms, qkv, attention, four of the MLP, whose GELU is written as seven operators.
            "saved_bytes": (2 + 1 + 3 + 1 + 5 * 4) * TOKEN * LENGTH,
            "output_bytes": TOKEN * LENGTH,
            "working_bytes": 3 * 4 * TOKEN * LENGTH,
            "flops": (matrices + scores) * LENGTH,
            "products": 6,
            "bytes": (2 * 2 + 2 * 3 + 18 * 4) * TOKEN * LENGTH,
            "operators": 14,
        },
        {
            "name": "head",
            "saved_bytes": 2 * TOKEN * LENGTH + logits,
            "working_bytes": 2 * logits,
            "flops": 2 * WIDTH * VOCABULARY * LENGTH,
            "bytes": 6 * logits,
            "operators": 3,
        },
    ]
    return LayerFile.model_validate({"name": "GPT-2", "tokens": LENGTH, "layers": layers})


@pytest.fixture(scope="module")
def captured() -> Study:
    config = GPT2Config(n_layer=LAYERS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with folded(model, fold=False) as blocks:
        return Study.of(Recipe(model), {"input_ids": ids, "labels": ids}, "adamw", blocks)


@pytest.mark.parametrize(
    ("replicas", "savings"),
    [(1, NO_SAVINGS), (4, NO_SAVINGS), (4, Savings(zero=3))],
    ids=["alone", "replicas", "zero 3"],
)
def test_gpt2_by_the_book_costs_what_the_captured_one_does(captured: Study, replicas: int, savings: Savings) -> None:
    cluster = ClusterSpec.load(f"{replicas}xA100-SXM4-80GB")
    described = DescribedStudy.of_file(gpt2(), "adamw", ROWS)
    one, other = (
        study.candidate(levels_of(replicas, 1), cluster, cluster.speeds(), 1, savings)
        for study in (described, captured)
    )
    rows = [ROWS // replicas] * replicas
    assert one.played(rows).step_s == pytest.approx(other.played(rows).step_s, rel=0.08)
    ours, theirs = one.work(0, rows[0]), other.work(0, rows[0])
    assert ours.peak == pytest.approx(theirs.peak, rel=0.08)
    assert ours.flops == pytest.approx(theirs.flops, rel=0.02)
    for name in ("parameters", "gradients", "optimizer"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3)


# -- seconds as they were measured


@pytest.mark.parametrize(
    ("rows", "seconds", "asked", "expected"),
    [
        ((1, 2, 4), (1.0, 2.0, 4.0), 3, 3.0),  # between
        ((1, 2, 4), (1.0, 2.0, 3.0), 8, 5.0),  # beyond: along the last two
        ((1, 2, 4), (3.0, 2.0, 4.0), 1, 2.0),  # fewer rows never take longer
        ((8,), (4.0,), 2, 1.0),  # one figure: in proportion
        ((8, 16), (1.0, 3.0), 4, 0.5),  # below: in proportion at most
        ((8, 16), (2.0, 3.0), 4, 1.5),  # below: along the first two
        ((1,), (1.0,), 0, 0.0),
    ],
)
def test_seconds_by_rows(rows: tuple[int, ...], seconds: tuple[float, ...], asked: int, expected: float) -> None:
    assert seconds_of(rows, seconds)(asked) == pytest.approx(expected)


def example(
    cluster: str, mesh: tuple[int, int], rows: int, microbatches: int = 1, savings: Savings = NO_SAVINGS
) -> DescribedCandidate:
    found = ClusterSpec.load(cluster)
    study = DescribedStudy.of_file(read_layers(EXAMPLE), "adam", rows)
    return study.candidate(levels_of(*mesh), found, found.speeds(), microbatches, savings)


def test_a_step_takes_what_its_layers_were_measured_to_take() -> None:
    """GH200, split 4, 8 rows: embedding, first block, 23 blocks, head; then the update of 26 layers."""
    forward = 0.000922 + 0.003021 + 23 * 0.002683 + 0.004014
    backward = 0.000001 + 0.006469 + 23 * 0.00647 + 0.005944
    update = 0.000482 + 24 * 0.000482 + 0.000482
    step_s = example("4xGH200", (1, 4), 8).played((8,)).step_s
    assert step_s == pytest.approx(forward + backward + update, rel=1e-3)
    twice = example("4xGH200", (1, 4), 16, 2).played((16,)).step_s
    assert twice == pytest.approx(2 * (forward + backward) + update, rel=1e-3)
    halved = example("4xGH200*0.5", (1, 4), 8).played((8,)).step_s
    assert halved == pytest.approx(2 * step_s)


def test_memory_of_a_step() -> None:
    """Parameters, gradients and two states of Adam, what is saved, and the gradients of what the head saved."""
    work = example("4xGH200", (1, 4), 8).work(0, 8)
    parameters = 15073280 + 3153664 * 24 + 12978176
    saved = 2101760 + 27398144 + 23 * 27267072 + 54532864
    assert work.parameters == work.gradients == 4 * parameters
    assert work.optimizer == 8 * parameters
    gradients = 12978176  # of the head alone: the others are still to come
    assert work.peak == 12 * parameters + 4 * (8 * (saved + 54532864) + gradients)
    kept = example("4xGH200", (1, 4), 16, 2).work(0, 16)
    assert kept.peak == 16 * parameters + 4 * (8 * (saved + 54532864) + gradients)  # the second microbatch adds to them


def test_recomputation_keeps_inputs_alone_and_runs_layers_again() -> None:
    plain, full = (example("1xGH200", (1, 1), 8, 1, Savings(0, how)) for how in ("none", "full"))
    forward = 0.000369 + 0.007607 + 23 * 0.006988 + 0.014852
    assert full.played((8,)).step_s == pytest.approx(plain.played((8,)).step_s + forward, rel=1e-3)
    saved = 4 * 8 * (25 * 2097152)
    head = 2 * 4 * 8 * 208673536 - 4 * 8 * 2097152 + 4 * 51513344
    assert full.work(0, 8).peak == pytest.approx(12 * (53608448 + 24 * 12596224 + 51513344) + saved + head, rel=1e-6)


@pytest.mark.parametrize(("zero", "parts"), [(1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_zero_keeps_parts(zero: int, parts: tuple[int, int, int]) -> None:
    whole = example("4xGH200", (4, 1), 32).work(0, 8)
    work = example("4xGH200", (4, 1), 32, 1, Savings(zero)).work(0, 8)
    held = ((work.parameters, whole.parameters), (work.gradients, whole.gradients), (work.optimizer, whole.optimizer))
    for (kept, before), part in zip(held, parts, strict=True):
        assert kept == pytest.approx(before / part, rel=1e-6)
    assert work.peak < whole.peak


def test_shares_follow_the_seconds_of_each_type() -> None:
    candidate = example("1xRTX-3090 + 1xTitan-RTX", (2, 1), 12, 3)
    rows = best_rows(candidate, 12)
    steps = {k: candidate.played((k, 12 - k)).step_s for k in range(3, 10)}
    assert steps[rows[0]] == pytest.approx(min(steps.values()), rel=0.02)
    assert rows[0] > rows[1]


# -- what the file does not say


def test_unknown_types_and_degrees() -> None:
    with pytest.raises(PlanError) as missing:
        example("1xV100-SXM2-16GB", (1, 1), 8)
    assert str(missing.value) == (
        "layer 'embedding' has no seconds on V100-SXM2-16GB\n"
        "  fix: it has those of GH200, RTX-3090, Titan-RTX; add this type, or `flops:` and `bytes:`"
    )
    with pytest.raises(AnnotationError) as degree:
        example("8xGH200", (1, 8), 8)
    assert str(degree.value) == (
        "layer 'embedding' has no seconds on GH200 at split degree 8\n"
        "  fix: it has those at 1, 2, 4: choose one with --split, or add this degree"
    )


def test_a_layer_that_a_split_leaves_whole_needs_the_seconds_of_one_device() -> None:
    seconds = {"rows": [1], "forward_s": [0.1], "backward_s": [0.2]}
    entry = {"name": "norm", "split": "whole", "seconds": {"A100-SXM4-80GB": {2: seconds}}}
    cluster = ClusterSpec.load("2xA100-SXM4-80GB")
    study = DescribedStudy.of_file(LayerFile.model_validate({"name": "one", "layers": [entry]}), "sgd", 2)
    with pytest.raises(AnnotationError) as found:
        study.candidate(levels_of(1, 2), cluster, cluster.speeds())
    assert str(found.value) == (
        "layer 'norm' has no seconds on A100-SXM4-80GB at split degree 1, which a split leaves it at\n"
        "  fix: it has those at 2: add this degree"
    )


def layer(**own: Any) -> LayerFile:
    return LayerFile.model_validate({"name": "one", "layers": [{"name": "layer", "bytes": 1e9, **own}]})


@pytest.mark.parametrize(
    ("split", "parameters", "flops", "sent"),
    [
        ("parts", 1000, 8e9, [2 * 2e6 * 3 / 4] * 2),
        ("whole", 4000, 32e9, [2 * 2e6 * 3 / 4] * 2),
        ("rows", 4000, 8e9, [2 * 2e6 * 3 / 4] * 2 + [2 * 16000 * 3 / 4]),  # at last its gradients
    ],
)
def test_what_a_split_does_to_a_layer(split: str, parameters: int, flops: float, sent: list[float]) -> None:
    cluster = ClusterSpec.load("4xA100-SXM4-80GB")
    file = layer(parameters=4000, split=split, flops=16e9 / 3, exchanges=[{"kind": "all-reduce", "bytes": 1e6}])
    work = DescribedStudy.of_file(file, "sgd", 2).candidate(levels_of(1, 4), cluster, cluster.speeds()).work(0, 2)
    assert work.parameters == 4 * parameters
    assert work.flops == pytest.approx(flops)
    assert [event.bytes for event in work.events if event.collective] == sent


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 12.0), ("all-gather", 6.0), ("reduce-scatter", 6.0), ("all-to-all", 1.5)],
)
def test_bytes_that_one_of_four_sends_of_a_value_of_eight(kind: str, sent: float) -> None:
    cluster = ClusterSpec.load("4xA100-SXM4-80GB")
    file = layer(exchanges=[{"kind": kind, "bytes": 8e6}])
    work = DescribedStudy.of_file(file, "sgd", 1).candidate(levels_of(1, 4), cluster, cluster.speeds()).work(0, 1)
    assert [event.bytes for event in work.events if event.collective] == [sent * 1e6] * 2


def test_mixed_precision_keeps_float32_beside_what_it_reads() -> None:
    cluster = ClusterSpec.load("2xA100-SXM4-80GB")
    file = LayerFile.model_validate(
        {"name": "one", "dtype": "bf16", "master": True, "layers": [{"name": "l", "bytes": 1, "parameters": 10**6}]}
    )
    work = DescribedStudy.of_file(file, "adamw", 2).candidate(levels_of(2, 1), cluster, cluster.speeds()).work(0, 1)
    assert (work.parameters, work.gradients, work.optimizer) == (4 * 10**6, 4 * 10**6, 8 * 10**6)
    assert work.peak >= 18 * 10**6
