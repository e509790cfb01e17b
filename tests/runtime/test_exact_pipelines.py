"""Pipelines train as in one process: every schedule, every nesting, unequal widths and shares, tied parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import whalepy
from tests import models, pipelines
from tests.exactness import Run, compare
from tests.pipelines import blocks, staged
from tests.pool import Pool


def gpt2(*bounds: int, outer: Any = (), wrap: pipelines.Wrap = pipelines.plain) -> dict[str, Any]:
    return staged(blocks("transformer.h.*", bounds), wrap, outer)


def unequal_split(k: int) -> Any:
    """One device feeds two, which share heads 3:1."""
    return whalepy.stage(1) if k == 0 else [whalepy.stage(2), whalepy.split(2, shares=(3, 1))]


def unequal_rows(k: int) -> Any:
    """One device feeds two, which share rows 3:1."""
    return whalepy.stage(1) if k == 0 else [whalepy.stage(2), whalepy.replicate(2, shares=(3, 1))]


def one_two_one(k: int) -> Any:
    return [whalepy.stage(2), whalepy.split(2, shares=(2, 1))] if k == 1 else whalepy.stage(1)


def replicas_of_splits(k: int) -> Any:
    """Other degrees on either side."""
    inside = [whalepy.replicate(2), whalepy.split(1)] if k == 0 else [whalepy.replicate(1), whalepy.split(2)]
    return [whalepy.stage(2), *inside]


def t5() -> dict[str, Any]:
    return staged([["encoder"], ["decoder.block.0"], ["decoder.block.1"]])


def two_halves(path: str = "", wrap: pipelines.Wrap = pipelines.plain) -> dict[str, Any]:
    """The encoder, and the decoder."""
    return staged([[f"{path}encoder"], [f"{path}decoder"]], wrap)


def bert(wrap: pipelines.Wrap = pipelines.plain) -> dict[str, Any]:
    return staged(blocks("bert.encoder.layer.*", (0, 1, 2)), wrap)


def resnet(head: Any) -> dict[str, Any]:
    """The body in two stages, and its head."""
    return {**staged([["resnet.embedder", "resnet.encoder.stages.0"], ["resnet.encoder.stages.1"]]), "classifier": head}


def classes_over_two() -> dict[str, Any]:
    return resnet([whalepy.stage(2), whalepy.split(2, shares=(3, 1), on="classifier.1.weight:0")])


def body_and_classes() -> dict[str, Any]:
    """A stage whose rows are shared feeds one whose classes are."""
    body = [whalepy.stage(2), whalepy.replicate(2, shares=(2, 1))]
    return {"resnet": body, "classifier": [whalepy.stage(2), whalepy.split(2, shares=(3, 1))]}


RUNS: dict[str, Run] = {
    "gpt2, two stages, tied": Run(
        pipelines.gpt2, lambda: gpt2(0, 2, 4), 2, clip=(0.5, 2.0), evaluate=True, options={"microbatches": 8}
    ),
    "gpt2, replicate > stages": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 1, 4, outer=[whalepy.replicate(shares=(2, 1))]),
        4,
        options={"microbatches": 2},
        evaluate=True,
        output=lambda o: o.logits,
    ),
    "gpt2, 1 feeds 2, split": Run(
        pipelines.gpt2, lambda: gpt2(0, 2, 4, wrap=unequal_split), 3, options={"microbatches": 3}, clip=(0.5, 2.0)
    ),
    "gpt2, 1 feeds 2, rows": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 2, 4, wrap=unequal_rows),
        3,
        options={"microbatches": 2},
        evaluate=True,
        output=lambda o: o.logits,
    ),
    "gpt2, 1 feeds 2 feeds 1": Run(
        pipelines.gpt2, lambda: gpt2(0, 1, 3, 4, wrap=one_two_one), 4, options={"microbatches": 8}
    ),
    "gpt2, implicit replicas": Run(pipelines.gpt2, lambda: gpt2(0, 2, 4), 4, options={"microbatches": 3}),
    "gpt2, one device more": Run(pipelines.gpt2, lambda: gpt2(0, 3, 4), 3, evaluate=True, options={"microbatches": 8}),
    "gpt2, an idle rank": Run(
        pipelines.gpt2, lambda: gpt2(0, 2, 4, wrap=lambda _: whalepy.stage(1)), 3, clip=(0.5, 2.0), evaluate=True
    ),
    "gpt2, gpipe": Run(pipelines.gpt2, lambda: gpt2(0, 2, 4), 2, options={"schedule": "gpipe", "microbatches": 3}),
    "gpt2, zero-bubble": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 1, 4),
        2,
        options={"schedule": "zero-bubble", "microbatches": 3},
        clip=(0.5, 2.0),
        evaluate=True,
    ),
    "gpt2, zero-bubble, 1 feeds 2": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 2, 4, wrap=unequal_split),
        3,
        options={"schedule": "zero-bubble", "microbatches": 3},
    ),
    "gpt2, interleaved": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 1, 2, 3, 4),
        2,
        options={"schedule": "interleaved:2", "microbatches": 4},
        evaluate=True,
    ),
    "gpt2, all stages on all devices": Run(
        pipelines.gpt2, lambda: gpt2(0, 2, 4, outer=[whalepy.cluster("all")]), 2, options={"microbatches": 2}
    ),
    "gpt2, 2 feed 2, split, zero-bubble": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 2, 4, wrap=lambda _: [whalepy.stage(2), whalepy.split(2)]),
        4,
        options={"schedule": "zero-bubble", "microbatches": 3},
        clip=(0.5, 2.0),
        evaluate=True,
    ),
    "products, 2 feed 2": Run(
        pipelines.feeding, lambda: pipelines.fed((1, 1), (3, 1)), 4, options={"microbatches": 3}, evaluate=True
    ),
    "products, shards feed shards": Run(
        pipelines.feeding,
        lambda: pipelines.fed((1, 1), (3, 1), on="second.0.weight:1"),
        4,
        evaluate=True,
        options={"microbatches": 4},
    ),
    "products, 3 feed 1": Run(pipelines.feeding, lambda: pipelines.fed((2, 1, 1), (1,)), 4, evaluate=True),
    "scores, 2 feed 2, few words": Run(
        pipelines.scoring, pipelines.scored, 4, evaluate=True, options={"microbatches": 4}
    ),
    "masks, rows feed one": Run(pipelines.masking, dict[str, Any], 3, evaluate=True),
    "masks, shards feed rows": Run(lambda: pipelines.masking(pipelines.MaskingOfShards), dict[str, Any], 4),
    "bert": Run(pipelines.bert, bert, 2, dtype=torch.float32, options={"microbatches": 6}),
    "bert, split degrees differ": Run(pipelines.bert, lambda: bert(replicas_of_splits), 4, options={"microbatches": 2}),
    "llama": Run(pipelines.llama, lambda: staged(blocks("model.layers.*", (0, 1, 2))), 2, options={"microbatches": 6}),
    "mixtral": Run(
        models.mixtral,
        lambda: staged(blocks("model.layers.*", (0, 1, 2)), wrap=unequal_rows),
        3,
        dtype=torch.float32,
        options={"microbatches": 2},
    ),
    "t5": Run(pipelines.t5, t5, 3, evaluate=True, options={"microbatches": 6}),
    "t5, three microbatches": Run(
        pipelines.t5, two_halves, 2, options={"microbatches": 3, "schedule": "1f1b"}, evaluate=True
    ),
    "t5, microbatches that do not divide": Run(
        pipelines.t5, lambda: two_halves(wrap=unequal_split), 3, options={"microbatches": 4}, evaluate=True
    ),
    "t5, 1 feeds 2, rows": Run(
        pipelines.t5, lambda: two_halves(wrap=unequal_rows), 3, options={"microbatches": 2}, evaluate=True
    ),
    "bart": Run(pipelines.bart, lambda: two_halves("model."), 2, options={"microbatches": 3}),
    "vit": Run(pipelines.vit, lambda: staged(blocks("vit.layers.*", (0, 1, 2))), 2),
    "resnet, 100,003 classes over two": Run(pipelines.resnet, classes_over_two, 4, evaluate=True),
    "resnet, rows feed 100,003 classes": Run(
        pipelines.resnet, body_and_classes, 4, options={"sync_batchnorm": True}, evaluate=True
    ),
    "skips, lent and written": Run(pipelines.skipping, dict[str, Any], 3, options={"microbatches": 2}, evaluate=True),
    "convolutions, classes over two": Run(
        pipelines.convolutions,
        lambda: {"[01]": whalepy.stage(1), "2": [whalepy.stage(2), whalepy.split(2, shares=(3, 1))]},
        3,
        loss_fn=models.classes_loss,
        evaluate=True,
    ),
    "written in training, read in evaluation": Run(pipelines.counting, dict[str, Any], 2, evaluate=True),
    "entered before what it reads": Run(
        pipelines.towers, pipelines.towers_from_behind, 2, options={"microbatches": 2}, evaluate=True
    ),
    "one microbatch": Run(pipelines.gpt2, lambda: gpt2(0, 2, 4), 2, options={"microbatches": 1}, evaluate=True),
    "more than rows of some": Run(
        pipelines.gpt2,
        lambda: gpt2(0, 2, 4, outer=[whalepy.replicate(shares=(3, 1))]),
        4,
        options={"microbatches": 4},
        accumulate=2,
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_pipelines(workers: Pool, run: Run) -> None:
    compare(workers, run)
