"""Which models train in stages as they do in one process: each of the catalogue as two stages, and as a stage of one
rank that feeds a stage of two that is split 3:1.

    python -m benchmarks.staged_models [--missing] [NAME ...]

writes a section of docs/models.md after every model, and prints a line: exact and with how many microbatches, refused
and why, or what is wrong; see benchmarks/models.py for what exact means. `--missing` makes only the rows that are not
there, names make theirs anew. Stages are halves, by number of parameters, of the model's outermost lists of modules, or
of its children, in the order in which they run.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

import whalepy
from benchmarks.model_table import DOCUMENT, cell
from benchmarks.models import MODELS, TIMEOUT_S, head, made, run_of
from benchmarks.staged_table import rows_in, summary, with_section
from tests.exactness import Outcome, momentum, outcome, wrong_in
from tests.pool import Pool
from whalepy.errors import VerificationError, WhaleError


def units(model: nn.Module, batch: dict[str, Any]) -> list[list[str]]:
    """Paths of what may be a part of a stage, in the order in which it first runs: the elements of the outermost lists
    of modules, and the model's children; without those that never run."""

    def lists(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
                yield from (f"{own}.{k}" for k, _ in child.named_children())
            else:
                yield from lists(child, own)

    children = [name for name, _ in model.named_children()]
    ran: dict[str, None] = {}
    modules = {path: model.get_submodule(path) for path in (*lists(model, ""), *children)}
    hooks = [m.register_forward_pre_hook(lambda *_, path=path: ran.setdefault(path)) for path, m in modules.items()]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return [[path for path in ran if path in choice] for choice in (set(lists(model, "")), set(children))]


def halves(name: str) -> tuple[list[str], list[str]] | None:
    """The units of a model, cut where both halves have about as many parameters; None where one would have none."""
    model, (batch,) = made(name)
    for paths in units(model, batch):
        sizes = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in paths]
        best = min(range(1, len(paths)), key=lambda k: abs(sum(sizes[:k]) - sum(sizes[k:])), default=0)
        if sum(sizes[:best]) and sum(sizes[best:]):
            return paths[:best], paths[best:]
    return None


def two_stages(first: list[str], second: list[str]) -> dict[str, Any]:
    """Any rank for each."""
    return {path: scope for half in (first, second) for scope in [whalepy.stage()] for path in half}


def one_feeds_two(first: list[str], second: list[str]) -> dict[str, Any]:
    """One rank, then two that are split 3:1."""
    one, two = whalepy.stage(1), [whalepy.stage(2), whalepy.split(2, shares=[3, 1])]
    return {**dict.fromkeys(first, one), **dict.fromkeys(second, two)}


ROUNDED = {"mobilevit"}
"""In one process too, with its rows flipped, AdamW changes it by 1.6e-11, where 2e-11 is allowed; SGD by 4e-14. Trained
with SGD."""
ANNOTATIONS = {"two stages": (2, two_stages), "1 feeds 2": (3, one_feeds_two)}


def result_of(pool: Pool, name: str, annotation: str) -> str:
    """How one run ended."""
    world, annotations = ANNOTATIONS[annotation]
    run = run_of(name, "split 3:1")
    try:
        parts = halves(name)
        if parts is None:
            return "not cut: its parameters are in one module"
        optimizer = momentum if name in ROUNDED else run.optimizer
        run = replace(run, annotations=partial(annotations, *parts), world=world, optimizer=optimizer)
        outcomes: list[Outcome] = pool.run(world, outcome, run, timeout_s=TIMEOUT_S)
    except VerificationError as error:
        return "FAILED: VerificationError: " + cell(str(error))
    except WhaleError as error:
        return "refused: " + cell(str(error))
    except Exception as error:
        return f"FAILED: {type(error).__name__}: " + cell(str(error))
    wrong, seen = wrong_in(outcomes), outcomes[0]
    why = [note.partition(": ")[2] for note in seen.notes if note.startswith("one microbatch: ")]
    told = cell("; ".join([f"{seen.microbatches} microbatches", *why]))
    return f"WRONG: {cell(wrong[0])} ({told})" if wrong else f"exact: {told}"


def written(name: str, results: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The rows of the document, this one among them."""
    text = DOCUMENT.read_text()
    known = {**rows_in(text), name: results}
    rows = {name: known[name] for name in MODELS if name in known}
    missing = [name for name in MODELS if name not in known]
    date = datetime.date.today().isoformat()
    DOCUMENT.write_text(with_section(text, rows, tuple(ANNOTATIONS), head().versions, date, missing))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staged_models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="make these rows anew, and keep the others")
    parser.add_argument("--missing", action="store_true", help="make the rows that are not there")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(MODELS)):
        parser.error(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    rows = rows_in(DOCUMENT.read_text())
    pool = Pool()
    try:
        for name in options.names or [name for name in MODELS if not (options.missing and name in rows)]:
            start = time.monotonic()
            results = tuple(result_of(pool, name, annotation) for annotation in ANNOTATIONS)
            told = "; ".join(f"{annotation}: {result}" for annotation, result in zip(ANNOTATIONS, results, strict=True))
            print(f"{name} ({time.monotonic() - start:.0f} s): {told}", flush=True)
            rows = written(name, results)
    finally:
        pool.close()
    print(summary(rows))


if __name__ == "__main__":
    main()
