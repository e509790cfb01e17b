"""Which models train in stages as they do in one process: each of the catalogue as two stages, and as a stage of one
rank that feeds a stage of two that is split 3:1.

    python -m benchmarks.staged_models [--start N] [NAME ...]

Stages are halves, by number of parameters, of the model's outermost lists of modules. A line per model is printed:
exact, refused and why, or what is wrong; see benchmarks/models.py for what exact means.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

import whalepy
from benchmarks.model_table import cell
from benchmarks.models import MODELS, TIMEOUT_S, made, run_of
from tests.exactness import differences
from tests.pool import Pool
from whalepy.errors import VerificationError, WhaleError


def units(model: nn.Module) -> list[str]:
    """Paths of the elements of the model's outermost lists of modules, else of its children, in their order."""

    def lists(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
                yield from (f"{own}.{k}" for k, _ in child.named_children())
            else:
                yield from lists(child, own)

    return list(lists(model, "")) or [name for name, _ in model.named_children()]


def halves(name: str) -> tuple[list[str], list[str]]:
    """The units of a model, cut where both halves have about as many parameters."""
    model, _ = made(name)
    paths = units(model)
    sizes = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in paths]
    best = min(range(1, len(paths)), key=lambda k: abs(sum(sizes[:k]) - sum(sizes[k:])), default=1)
    return paths[:best], paths[best:]


def two_stages(name: str) -> dict[str, Any]:
    """Any rank for each."""
    return {path: scope for half in halves(name) for scope in [whalepy.stage()] for path in half}


def one_feeds_two(name: str) -> dict[str, Any]:
    """One rank, then two that are split 3:1."""
    first, second = halves(name)
    one, two = whalepy.stage(1), [whalepy.stage(2), whalepy.split(2, shares=[3, 1])]
    return {**dict.fromkeys(first, one), **dict.fromkeys(second, two)}


ANNOTATIONS = {"two stages": (2, two_stages), "1 feeds 2": (3, one_feeds_two)}


def result_of(pool: Pool, name: str, annotation: str) -> str:
    """How one run ended."""
    world, annotations = ANNOTATIONS[annotation]
    run = run_of(name, "split 3:1")
    run = replace(run, annotations=partial(annotations, name), world=world, options={})
    try:
        wrong = differences(pool, run, timeout_s=TIMEOUT_S)
    except VerificationError as error:
        return "FAILED: VerificationError: " + cell(str(error))
    except WhaleError as error:
        return "refused: " + cell(str(error))
    except Exception as error:
        return f"FAILED: {type(error).__name__}: " + cell(str(error))
    return "WRONG: " + cell(wrong[0]) if wrong else "exact"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staged_models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(MODELS)):
        parser.error(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    pool = Pool()
    counts: dict[str, int] = {}
    try:
        for name in options.names or list(MODELS)[options.start :]:
            start = time.monotonic()
            results = {annotation: result_of(pool, name, annotation) for annotation in ANNOTATIONS}
            told = "; ".join(f"{annotation}: {result}" for annotation, result in results.items())
            print(f"{name} ({time.monotonic() - start:.0f} s): {told}", flush=True)
            for result in results.values():
                kind = result.partition(":")[0]
                counts[kind] = counts.get(kind, 0) + 1
    finally:
        pool.close()
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))


if __name__ == "__main__":
    main()
