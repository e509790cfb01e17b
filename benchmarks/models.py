"""Which models train as they do in one process: each of the catalogue, under three annotations, in gloo processes.

    python -m benchmarks.models [--missing] [NAME ...]

writes docs/models.md after every model, so that it may be stopped and gone on with: `--missing` makes only the rows
that are not there, names make theirs anew. Weights are random and small. A model is exact where loss,
every gradient, every parameter after each step and every buffer are those of the local run, in float64, within 1e-9
of the largest of their kind (1e-5 in float32, for operators that torch has in no other); see tests/exactness.py.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import whalepy
from benchmarks.catalogue import CATALOGUE
from benchmarks.further import FURTHER
from benchmarks.language_models import LANGUAGE
from benchmarks.model_table import DOCUMENT, Head, Row, cell, document, read_rows, summary
from benchmarks.multimodal_models import MULTIMODAL
from benchmarks.popular_models import POPULAR
from benchmarks.staged_table import section
from benchmarks.text_models import TEXT
from benchmarks.vision_models import VISION
from tests.exactness import Run, differences, momentum
from tests.pool import Pool
from whalepy.errors import VerificationError, WhaleError
from whalepy.program.analysis import Program
from whalepy.runtime.build import Recipe, analysed, captured_program

NAMED = (
    *("gpt2", "bert", "llama", "qwen3", "t5", "vit", "resnet", "gptj", "whisper"),
    *("clip", "unet", "dlrm", "lstm", "mixtral"),
)
_ALL = {**CATALOGUE, **FURTHER, **POPULAR, **MULTIMODAL, **TEXT, **LANGUAGE, **VISION}
MODELS = {name: _ALL[name] for name in (*NAMED, *(name for name in _ALL if name not in NAMED))}
FLOAT32_ONLY = {  # baddbmm with a float32 bias, grouped products, tables, masks and losses made in float32
    *("bloom", "mixtral", "qwen2_moe", "jamba", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss"),
    *("granitemoe", "minimax", "olmoe", "phimoe", "qwen3_moe", "qwen3_next", "splinter", "switch", "vaultgemma"),
    *("xglm", "tapas", "wav2vec2_ctc", "diffllama", "prophetnet", "longt5_global", "nllb_moe"),
}
ILL_CONDITIONED = {"mobilenet_v1", "mobilenet_v2"}
"""Batch norm over few values: in one process too, with its rows flipped, AdamW changes parameters by 1e-8 more or less
after two steps, and SGD with momentum by 1e-12. These are trained with SGD."""
STEPS, TIMEOUT_S = 2, 240.0  # a run that takes longer hangs


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
    optimizer = momentum if name in ILL_CONDITIONED else None
    return Run(partial(made, name), annotations, world, steps=steps, dtype=dtype, optimizer=optimizer, options=options)


def tried(pool: Pool, name: str) -> Row:
    """Train one model under every annotation."""
    operators, without_rule = pool.run(1, counted, name)[0]
    return Row(name, operators, without_rule, tuple(_result(pool, name, annotation) for annotation in ANNOTATIONS))


def counted(name: str) -> tuple[int, tuple[str, ...]]:
    """The operators of the captured model that compute, and the names of those without a rule; none if refused."""
    try:
        program = analysis(name)
    except Exception:  # the runs tell it
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
    except VerificationError as error:
        return "**failed**: VerificationError: " + cell(str(error))
    except WhaleError as error:
        return "refused: " + cell(str(error))
    except Exception as error:
        return f"**failed**: {type(error).__name__}: " + cell(str(error))
    return "**wrong**: " + cell(wrong[0]) if wrong else "exact"


def head() -> Head:
    import transformers

    names = tuple(ANNOTATIONS), tuple(FLOAT32_ONLY), tuple(ILL_CONDITIONED)
    return Head(torch.__version__, transformers.__version__, STEPS, *names)


def rows_of(names: Sequence[str]) -> Iterator[Row]:
    """One row after the other; a line of progress for each, and what is not exact below it."""
    pool = Pool()
    try:
        for count, name in enumerate(names, start=1):
            start = time.monotonic()
            row = tried(pool, name)
            seconds = time.monotonic() - start
            print(f"[{count}/{len(names)}] {name}: {', '.join(row.kinds)} ({seconds:.0f} s)", flush=True)
            for result in dict.fromkeys(result for result in row.results if result != "exact"):
                print(f"    {result}", flush=True)
            yield row
    finally:
        pool.close()


def kept(options: argparse.Namespace) -> dict[str, Row]:
    """The rows of the document that stay until they are made again."""
    if not DOCUMENT.exists() or not (options.missing or options.names):
        return {}
    rows = {row.name: row for row in read_rows(DOCUMENT.read_text(), head())}
    return {name: rows[name] for name in MODELS if name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="make these rows anew, and keep the others")
    parser.add_argument("--missing", action="store_true", help="keep the rows made with the same versions")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(MODELS)):
        parser.error(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    rows = kept(options)
    pipelines = section(DOCUMENT.read_text()) if DOCUMENT.exists() else ""
    for row in rows_of(options.names or [name for name in MODELS if name not in rows]):
        rows[row.name] = row
        date = datetime.date.today().isoformat()
        DOCUMENT.write_text(document(head(), date, [rows[name] for name in MODELS if name in rows]) + pipelines)
    print(summary(rows.values()))


if __name__ == "__main__":
    main()
