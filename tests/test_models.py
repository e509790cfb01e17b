"""Architectures nobody wrote a rule for train as they do in one process, or are refused in a sentence."""

from __future__ import annotations

import re
from itertools import product

import pytest

from benchmarks.models import ANNOTATIONS, MODELS, Row, run_of, summary
from tests.exactness import compare
from tests.pool import Pool
from whalepy.errors import WhaleError

# Each architecture once, each annotation with decoders, encoders, images and recurrences; all pairs are slow.
COVER = [
    ("gpt2", "replicate > split"),
    ("bert", "split 3:1"),
    ("llama", "split 3:1"),
    ("qwen3", "replicate 3:1"),
    ("t5", "replicate 3:1"),
    ("vit", "replicate 3:1"),
    ("resnet", "split 3:1"),
    ("gptj", "split 3:1"),
    ("whisper", "split 3:1"),
    ("unet", "replicate > split"),
    ("dlrm", "replicate > split"),
    ("lstm", "replicate 3:1"),
    ("clip", "replicate > split"),
    ("mixtral", "replicate 3:1"),
]

# What is refused, and what the sentence must name.
REFUSED = {
    "vilt": r"at:  modeling_vilt\.py:\d+",  # how many patches there are depends on the mask
    "adaptive_softmax": r"at:  own_sequences\.py:\d+",  # which words fall into which cluster
    "longformer": r"at:  modeling_longformer\.py:\d+",
}


@pytest.mark.parametrize(("name", "annotation"), COVER)
def test_exact(workers: Pool, name: str, annotation: str) -> None:
    compare(workers, run_of(name, annotation, steps=1))


def check_refused(workers: Pool, name: str, annotation: str) -> None:
    """The same sentence for every annotation, with the line of the model that must change."""
    with pytest.raises(WhaleError) as refused:
        compare(workers, run_of(name, annotation, steps=1))
    assert re.search(REFUSED[name], str(refused.value)), str(refused.value)
    assert refused.value.fix


def test_refused(workers: Pool) -> None:
    check_refused(workers, "adaptive_softmax", "replicate 3:1")


REST = [pair for pair in product(MODELS, ANNOTATIONS) if pair not in COVER]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "annotation"), REST)
def test_the_whole_matrix(workers: Pool, name: str, annotation: str) -> None:
    if name in REFUSED:
        check_refused(workers, name, annotation)
    else:
        compare(workers, run_of(name, annotation), timeout_s=600)


def test_the_cover_meets_every_annotation_several_times() -> None:
    counts = [sum(pair[1] == annotation for pair in COVER) for annotation in ANNOTATIONS]
    assert min(counts) >= 3, counts


def test_a_row_tells_what_was_refused() -> None:
    row = Row("a", 3, ("aten.sort",), ("exact", "refused: the model fixes the batch", "**wrong**: loss"))
    assert str(row) == "| a | 3 | `aten.sort` | exact | refused: the model fixes the batch | **wrong**: loss |"
    assert summary([row]) == "1 models, 3 runs: 1 exact, 1 refused, 1 neither."
