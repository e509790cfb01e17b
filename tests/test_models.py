"""Architectures nobody wrote a rule for train as they do in one process, or are refused in a sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

import whalepy
from benchmarks.model_table import DOCUMENT, Head, Row, cell, document, read_rows, summary
from benchmarks.models import ANNOTATIONS, MODELS, NAMED, head, run_of
from benchmarks.staged_table import rows_in, section, with_section
from benchmarks.staged_table import summary as staged_summary
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
    "ctc": r"at:  own_sequences\.py:\d+",  # how much ctc_loss keeps for its backward depends on the lengths
    "longformer": r"at:  modeling_longformer\.py:\d+",
    "nystromformer": r"at:  modeling_nystromformer\.py:\d+",
    "llava": r"at:  modeling_llava\.py:\d+",  # walks over the images one by one
    "wav2vec2_ctc": r"at:  loss_ctc\.py:\d+|at:  modeling_wav2vec2\.py:\d+",  # picks out the labels that count
    "informer": r"at:  modeling_informer\.py:\d+",  # takes a mask of the undistilled length, which only export makes
    "autoformer": r"at:  modeling_autoformer\.py:\d+",  # likewise for a mask of the wrong length
    "flava": r"at:  modeling_flava\.py:\d+",  # gathers from all ranks by itself
    "led": r"at:  modeling_led\.py:\d+",  # attends globally where the mask says so, as longformer
    "ibert": r"at:  quant_modules\.py:\d+",  # starts its ranges where they are equal
    "fsmt": r"at:  modeling_fsmt\.py:\d+",  # drops a mask that masks nothing
    "reformer": r"at:  modeling_reformer\.py:\d+",  # its autograd function takes objects
    "yoso": r"at:  modeling_yoso\.py:\d+",  # likewise
    "nllb_moe": r"at:  modeling_nllb_moe\.py:\d+",  # which expert gets which word
    "dbrx": r"at:  modeling_dbrx\.py:\d+",  # likewise
    "switch": r"at:  modeling_switch_transformers\.py:\d+",  # likewise
    "detr": r"in modeling_detr\.py:\d+",  # clamps if any value is infinite
}


@pytest.mark.parametrize(("name", "annotation"), COVER)
def test_exact(workers: Pool, name: str, annotation: str) -> None:
    compare(workers, run_of(name, annotation, steps=1))


def test_tables_are_split_by_rows(workers: Pool) -> None:
    """One embedding table in bags, over two devices 3:1: each looks up the rows it holds."""

    def tables() -> dict[str, Any]:
        return {"bags": whalepy.split(2, shares=[3, 1], on="bags.0.weight:0")}

    compare(workers, replace(run_of("dlrm", "split 3:1", steps=2), annotations=tables))


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


def test_the_table_of_models_holds_no_wrong_row_and_refuses_what_is_said_here() -> None:
    rows = read_rows(DOCUMENT.read_text(), head())
    assert {row.name for row in rows} >= set(NAMED)
    assert not [row for row in rows if {"wrong", "failed"} & set(row.kinds)]
    refused = {row.name for row in rows if "refused" in row.kinds}
    assert refused <= set(REFUSED), "say in REFUSED what the sentence names"


def test_the_cover_meets_every_annotation_several_times() -> None:
    counts = [sum(pair[1] == annotation for pair in COVER) for annotation in ANNOTATIONS]
    assert min(counts) >= 3, counts


ROWS = [
    Row("a", 3, ("sort", "cumsum"), ("exact", "refused: " + cell("fixes a | b\n  fix: c"), "**wrong**: loss")),
    Row("b", 0, (), ("exact", "exact", "exact")),
    Row("c", 1, (), ("exact", "exact", "**failed**: KeyError: 3")),
    Row("d", 1, (), ("refused: no", "refused: no", "refused: no")),
]
HEAD = Head("2.0", "5.0", 2, tuple(ANNOTATIONS), ("a",), ("b",))


def test_a_row_tells_what_was_refused() -> None:
    assert str(ROWS[0]) == ("| a | 3 | `sort`, `cumsum` | exact | refused: fixes a \\| b fix: c | **wrong**: loss |")
    assert summary(ROWS) == (
        "4 models, 1 of them exact under every annotation. 12 runs: 6 exact, 4 refused, 1 wrong, 1 failed."
    )
    assert str(ROWS[3]) == "| d | 1 | - | refused: no | likewise | likewise |"


def test_a_document_is_read_as_it_was_written() -> None:
    assert read_rows(document(HEAD, "2026-01-31", ROWS), HEAD) == ROWS


def test_rows_of_other_versions_are_made_anew() -> None:
    assert read_rows(document(replace(HEAD, torch="2.1"), "2026-01-31", ROWS), HEAD) == []


STAGED = {"a": ("exact: 8 microbatches", "refused: fixes a \\| b"), "b": ("exact: 1 microbatches; why", "WRONG: loss")}
STAGED["c"] = ("refused: for a reason that is long", "refused: for a reason that is long")


def test_the_section_of_pipelines_is_read_as_it_was_written_and_stays_below_the_models() -> None:
    text = document(HEAD, "2026-01-31", ROWS)
    made = with_section(text, STAGED, ("one", "other"), "torch 2.0", "2026-01-31", ["d"])
    assert "| c | refused: for a reason that is long | likewise |" in made
    assert rows_in(made) == STAGED
    assert read_rows(made, HEAD) == ROWS
    assert text + section(made) == made
    assert with_section(made, STAGED, ("one", "other"), "torch 2.0", "2026-01-31", ["d"]) == made
    assert staged_summary(STAGED) == (
        "3 models, 0 of them exact both ways. 6 runs: 2 exact, 3 refused, 0 not cut, 1 wrong, 0 failed."
    )


def test_no_model_is_wrong_or_fails_in_stages() -> None:
    rows = rows_in(DOCUMENT.read_text())
    assert not {n: r for n, r in rows.items() if any(x.startswith(("WRONG", "FAILED")) for x in r)}


def test_the_named_models_come_first() -> None:
    assert tuple(MODELS)[: len(NAMED)] == NAMED
