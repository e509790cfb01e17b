"""GPT-2 and BERT train as in one process, whatever the primitives, the shares and the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
import torch

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool

MAKE = {"gpt2": models.gpt2, "bert": models.bert}
HEAD = {"gpt2": ("transformer", "lm_head"), "bert": ("bert", "cls")}
BLOCKS = {"gpt2": "transformer.h.*", "bert": "bert.encoder.layer.*"}
SIBLINGS = {
    "gpt2": ("transformer.h.*.attn", "transformer.h.*.mlp"),
    "bert": ("bert.encoder.layer.*.attention", "bert.encoder.layer.*.intermediate"),
}
SHARES: dict[str, tuple[int, ...]] = {"1:1": (1, 1), "3:1": (3, 1), "5:2:1": (5, 2, 1), "1:1:1:1": (1, 1, 1, 1)}
CLUSTERS = {"1:1": "2xcpu", "3:1": "2xcpu", "5:2:1": "3xcpu", "1:1:1:1": "2xcpu + 2xcpu*0.5"}

Scopes = Mapping[str, Any]


def replicate(model: str, shares: tuple[int, ...]) -> Scopes:
    return {"": whalepy.replicate(len(shares), shares=shares)}


def split(model: str, shares: tuple[int, ...]) -> Scopes:
    return {"": whalepy.split(len(shares), shares=shares)}


def blocks(model: str, shares: tuple[int, ...]) -> Scopes:
    """Only the blocks are split: everything else is an implicit replicate that cuts no input."""
    return {BLOCKS[model]: whalepy.split(len(shares), shares=shares)}


def head(model: str, shares: tuple[int, ...]) -> Scopes:
    """A replicated backbone, its head split by classes."""
    backbone, top = HEAD[model]
    return {backbone: whalepy.replicate(len(shares), shares=shares), top: whalepy.split(len(shares), shares=shares)}


def siblings(model: str, shares: tuple[int, ...]) -> Scopes:
    """Two scopes side by side on the same devices, with opposite shares."""
    one, other = SIBLINGS[model]
    return {
        one: whalepy.split(len(shares), shares=shares),
        other: whalepy.split(len(shares), shares=tuple(reversed(shares))),
    }


def nested(model: str, shares: tuple[int, ...]) -> Scopes:
    """replicate > split; half of the devices are half as fast."""
    return {"": [whalepy.replicate(2), whalepy.split(2, shares=(3, 1))]}


def nested_blocks(model: str, shares: tuple[int, ...]) -> Scopes:
    return {"": whalepy.replicate(2, shares=(3, 1)), BLOCKS[model]: whalepy.split(2)}


FLAT: dict[str, Callable[[str, tuple[int, ...]], Scopes]] = {
    "replicate": replicate,
    "split": split,
    "blocks": blocks,
    "head": head,
    "siblings": siblings,
}
NESTED = {"replicate > split": nested, "replicate > split blocks": nested_blocks}
PLACED = {**FLAT, **NESTED}


@dataclass(frozen=True)
class Case:
    placed: str
    shares: str
    model: str
    ignored: int
    """Rows without a label: five are all rows of the first rank under 5:2:1 and more than those under equal shares."""
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.model} {self.placed} {self.shares} ignored={self.ignored} {str(self.dtype)[6:]}"

    @property
    def pairs(self) -> set[tuple[tuple[int, Any], ...]]:
        fields = (self.placed, self.shares, self.model, self.ignored, self.dtype)
        return set(combinations(enumerate(fields), 2))


def all_cases() -> list[Case]:
    plain = [(placed, shares) for placed in FLAT for shares in SHARES if shares != "1:1:1:1" or placed == "replicate"]
    nests = [(placed, "1:1:1:1") for placed in NESTED]
    rest = product(MAKE, (0, 6), (torch.float64, torch.float32))
    return [Case(*place, *more) for place, more in product([*plain, *nests], list(rest))]


def pairwise(cases: list[Case]) -> list[Case]:
    """Few cases that hold every pair of choices that any case holds; ties: the first."""
    missing = set().union(*(case.pairs for case in cases))
    chosen: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: len(case.pairs & missing))
        chosen.append(best)
        missing -= best.pairs
    return chosen


def params() -> list[Any]:
    cases = all_cases()
    few = pairwise(cases)
    marked = [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in cases if case not in few]
    return [*(pytest.param(case, id=str(case)) for case in few), *marked]


@pytest.mark.parametrize("case", params())
def test_training_equals_the_local_run(workers: Pool, case: Case) -> None:
    name, shares, ignored = case.model, SHARES[case.shares], case.ignored
    layers = 2 if case.dtype == torch.float64 else 1
    make, placed = MAKE[name], PLACED[case.placed]
    run = Run(
        make=lambda: make(models.language_batches(ignored=ignored), layers),
        annotations=lambda: placed(name, shares),
        world=len(shares),
        spec=CLUSTERS[case.shares],
        dtype=case.dtype,
    )
    compare(workers, run)
