"""Small chains of blocks for tests of the dry run, and the figures of a step of theirs, folded and whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from whalepy.dryrun.blocks import folded
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Candidate, Savings, Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.work import Event, Rehearsal
from whalepy.primitives import Primitive
from whalepy.runtime.build import Recipe

WIDTH, LENGTH, ROWS, VOCABULARY = 32, 16, 8, 48
CARD = "V100-SXM2-32GB"
NO_SAVINGS = Savings()


class Block(nn.Module):
    """Attention that keeps its scores, or fused attention, and an MLP."""

    def __init__(self, width: int = WIDTH, *, hidden: int = 2 * WIDTH, fused: bool = False) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.fused:
            attended = nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        else:
            attended = (h @ h.transpose(1, 2)).softmax(-1) @ h
        x = x + self.mix(attended)
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """An embedding, blocks in a row, a head, which may be tied to the embedding."""

    def __init__(
        self, blocks: Iterable[nn.Module], *, tied: bool = False, width: int = WIDTH, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def chain(layers: int = 6, *, tied: bool = False, fused: bool = False) -> Chain:
    """On the meta device."""
    with torch.device("meta"):
        return Chain([Block(fused=fused) for _ in range(layers)], tied=tied)


def ids(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """A batch for a chain."""
    return {"ids": torch.zeros(rows, length, dtype=torch.long, device="meta")}


def cards(mesh: tuple[int, int]) -> ClusterSpec:
    """As many as a mesh has places."""
    return ClusterSpec.load(f"{mesh[0] * mesh[1]}x{CARD}")


def candidate_of(
    model: nn.Module, mesh: tuple[int, int], microbatches: int = 1, savings: Savings = NO_SAVINGS, example: Any = None
) -> Candidate:
    """The whole model under replicate and split, with AdamW."""
    cluster = cards(mesh)
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model), ids() if example is None else example, "adamw", blocks)
    return study.candidate(levels_of(*mesh), cluster, cluster.speeds(), microbatches, savings)


Case = tuple[int, Savings]
"""Microbatches and savings."""


def folded_and_whole(
    model: nn.Module,
    cluster: ClusterSpec,
    levels: Sequence[Primitive] | None,
    cases: Sequence[Case],
    *,
    example: Any = None,
    folds: int = 1,
    **options: Any,
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Per case the figures of rank 0, of the folded model and of the whole one."""
    found: list[list[dict[str, float]]] = []
    for fold in (True, False):
        with folded(model, fold=fold) as blocks:
            assert len(blocks.folds) == (folds if fold else 0)
            study = Study.of(Recipe(model), ids() if example is None else example, "adamw", blocks, **options)
            found.append([_figures(study.candidate(levels, cluster, cluster.speeds(), *case)) for case in cases])
    return list(zip(*found, strict=True))


def _figures(candidate: Candidate) -> dict[str, float]:
    each, more = divmod(candidate.study.rows, candidate.replicas)
    rows = tuple(each + (k < more) for k in range(candidate.replicas))
    work, played = candidate.work(0, rows[0]), candidate.played(rows)
    track = played.tracks[0]
    sent = {f"sent on {level}": sent_on(work, level) for level in range(len(candidate.plan.mesh))}
    return {
        "flops": work.flops,
        "parameters": work.parameters,
        "gradients": work.gradients,
        "optimizer": work.optimizer,
        "inputs": work.inputs,
        "peak": without_reductions(work).peak,
        "step_s": played.step_s,
        "busy_s": track.busy_s,
        "bridge_s": track.bridge_s,
        "gradient_total_s": track.gradient_total_s,
        **sent,
    }


EXACT = ("flops", "parameters", "gradients", "inputs")


def sent_on(work: Rehearsal, level: int) -> int:
    """Bytes that a rank sends on a level in a step."""
    return sum(event.bytes * times for event, times in work.weighted if event.collective and event.level == level)


def without_reductions(work: Rehearsal) -> Rehearsal:
    """Reductions of gradients hold buckets of up to 25 MiB, which small models never fill."""
    phases = [part.phase if isinstance(part, Event) else "" for part in work.parts]
    if "gradient" not in phases:
        return work
    start = phases.index("gradient")
    stop = phases.index("optimizer") if "optimizer" in phases else len(phases) - 1
    return replace(work, parts=(*work.parts[:start], *work.parts[stop:]))
