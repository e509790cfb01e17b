"""Which models train as they do in one process: each of the catalogue, under three annotations, in gloo processes.

    python -m benchmarks.models [NAMES]

writes docs/models.md; with names, prints only their rows. Weights are random and small. A model is exact where loss,
every gradient, every parameter after each step and every buffer are those of the local run, in float64, within 1e-9
of the largest of their kind (1e-5 in float32, for operators that torch has in no other); see tests/exactness.py.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import whalepy
from benchmarks.catalogue import CATALOGUE
from benchmarks.further import FURTHER
from benchmarks.language_models import LANGUAGE
from benchmarks.multimodal_models import MULTIMODAL
from benchmarks.text_models import TEXT
from benchmarks.vision_models import VISION
from tests.exactness import Run, differences
from tests.pool import Pool
from whalepy.errors import WhaleError
from whalepy.program.analysis import Program
from whalepy.runtime.build import Recipe, analysed, captured_program

MODELS = {**CATALOGUE, **FURTHER, **TEXT, **LANGUAGE, **VISION, **MULTIMODAL}
FLOAT32_ONLY = {  # baddbmm with a float32 bias, grouped products, tables and masks made in float32
    *("bloom", "mixtral", "qwen2_moe", "jamba", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss"),
    *(
        "granitemoe",
        "minimax",
        "olmoe",
        "phimoe",
        "qwen3_moe",
        "qwen3_next",
        "splinter",
        "switch",
        "vaultgemma",
        "xglm",
    ),
}
STEPS, TIMEOUT_S = 2, 300.0
DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


def _replicate() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=[3, 1])}


def _split() -> dict[str, Any]:
    return {"": whalepy.split(2, shares=[3, 1])}


def _nested() -> dict[str, Any]:
    return {"": [whalepy.replicate(2, shares=[3, 1]), whalepy.split(2, shares=[3, 1])]}


ANNOTATIONS: dict[str, tuple[int, Callable[[], Mapping[str, Any]]]] = {
    "replicate 3:1": (2, _replicate),
    "split 3:1": (2, _split),
    "replicate > split": (4, _nested),
}


def made(name: str) -> tuple[nn.Module, list[Any]]:
    """The model, in training mode, and its one global batch."""
    model, batch = MODELS[name]()
    return model.train(), [batch]


def run_of(name: str, annotation: str, steps: int = STEPS) -> Run:
    world, annotations = ANNOTATIONS[annotation]
    dtype = torch.float32 if name in FLOAT32_ONLY else torch.float64
    options = {"sync_batchnorm": True}
    return Run(partial(made, name), annotations, world, steps=steps, dtype=dtype, options=options)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    operators: int
    without_rule: tuple[str, ...]
    """Names of the operators that no rule fits."""
    results: tuple[str, ...]
    """Per annotation: exact, refused and why, or what is wrong."""

    def __str__(self) -> str:
        without = ", ".join(f"`{target}`" for target in self.without_rule) or "-"
        return f"| {self.name} | {self.operators} | {without} | {' | '.join(self.results)} |"


def tried(pool: Pool, name: str) -> Row:
    """Train one model under every annotation."""
    operators, without_rule = pool.run(1, counted, name)[0]
    return Row(name, operators, without_rule, tuple(_result(pool, name, annotation) for annotation in ANNOTATIONS))


def counted(name: str) -> tuple[int, tuple[str, ...]]:
    """The operators of the captured model that compute, and the names of those without a rule; none if refused."""
    try:
        program = analysis(name)
    except WhaleError:
        return 0, ()
    calls = [op for op in program.operators if op.kind == "call"]
    return len(calls), tuple(sorted({op.target for op in calls if op.operands and not op.has_rule}))


def analysis(name: str) -> Program:
    model, (batch,) = made(name)
    captured = captured_program(Recipe(model), (), batch, training=True, wants="loss")
    shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in batch.values()]
    return analysed(captured, shapes)


def _result(pool: Pool, name: str, annotation: str) -> str:
    try:
        wrong = differences(pool, run_of(name, annotation), timeout_s=TIMEOUT_S)
    except WhaleError as error:
        return "refused: " + _cell(str(error))
    except Exception as error:
        return f"**fails**: {type(error).__name__}: " + _cell(str(error))
    return "**wrong**: " + _cell(wrong[0]) if wrong else "exact"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:300]


HEAD = """# Models that were tried

Made by `python -m benchmarks.models` on {date}, with torch {torch} and transformers {transformers}, on gloo
processes of one machine. Small models with random weights, a batch of 8 rows, {steps} steps of AdamW, `shares=[3, 1]`
on every level, `sync_batchnorm=True`.

*exact*: loss, gradients, parameters and buffers are those of one process in float64, within 1e-9 of the largest
({float32}: in float32, within 1e-5, for want of float64 operators). *refused*: `compile` raises this error.
*Without rule*: operators that run replicated, and that `explain()` reports.

{summary}

| model | operators | without rule | {columns} |
|---|---|---|{lines}
"""


def document(rows: Sequence[Row]) -> str:
    import transformers

    return HEAD.format(
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        steps=STEPS,
        float32=", ".join(sorted(FLOAT32_ONLY)),
        summary=summary(rows),
        columns=" | ".join(ANNOTATIONS),
        lines="---|" * len(ANNOTATIONS),
    ) + "".join(f"{row}\n" for row in rows)


def summary(rows: Sequence[Row]) -> str:
    results = [result for row in rows for result in row.results]
    exact = sum(result == "exact" for result in results)
    refused = sum(result.startswith("refused") for result in results)
    return (
        f"{len(rows)} models, {len(results)} runs: {exact} exact, {refused} refused, "
        f"{len(results) - exact - refused} neither."
    )


def rows_of(names: Sequence[str]) -> Iterator[Row]:
    pool = Pool()
    try:
        for name in names:
            row = tried(pool, name)
            print(row, flush=True)
            yield row
    finally:
        pool.close()


def main() -> None:
    names = sys.argv[1:]
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        sys.exit(f"no model {', '.join(unknown)}: the catalogue has {', '.join(MODELS)}")
    rows = list(rows_of(names or list(MODELS)))
    if not names:
        DOCUMENT.write_text(document(rows))


if __name__ == "__main__":
    main()
