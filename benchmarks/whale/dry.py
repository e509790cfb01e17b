"""What the dry run says of a model on a cluster, for the scripts of this folder. No figure is made here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.whale.models import Made
from whalepy.dryrun import chosen
from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.shares import best_rows, equal_rows, rows_by_rate
from whalepy.dryrun.staged import tried_in_stages
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Candidate, Study
from whalepy.dryrun.tried import Balance, Options, Tried
from whalepy.hardware.cluster import ClusterSpec
from whalepy.primitives import annotate
from whalepy.runtime.build import Recipe

OPTIMIZER = "adam"
LINK = "50Gbit/s"
PER_NODE = 8


def v100s(count: int) -> str:
    """Nodes of eight V100-SXM2-32GB at 50 Gbit/s."""
    if count <= PER_NODE:
        return f"{count}xV100-SXM2-32GB"
    return f"{count // PER_NODE}x{PER_NODE}xV100-SXM2-32GB @ {LINK}"


def mixed(each: int) -> str:
    """One node of V100-SXM2-32GB and one of P100-PCIE-16GB, at 50 Gbit/s."""
    return f"{each}xV100-SXM2-32GB + {each}xP100-PCIE-16GB @ {LINK}"


@contextmanager
def studied(made: Made, *, fold: bool = True) -> Iterator[Study]:
    """A model captured once, for any number of rows and any cluster."""
    model, example = made
    with folded(model, fold=fold) as blocks:
        yield Study.of(Recipe(model), example, OPTIMIZER, blocks)


def candidate(study: Study, cluster: str, rows: int, *, annotated: bool = False) -> Candidate:
    """The model replicated on every device of a cluster, or as it is annotated, for a global batch of so many rows."""
    spec = ClusterSpec.load(cluster)
    levels = None if annotated else levels_of(len(spec.devices), 1)
    return study.with_rows(rows).candidate(levels, spec, spec.speeds())


@dataclass(frozen=True)
class Balanced:
    """Seconds of a step with each way to share out rows, and the rows of the first and of the last replica."""

    seconds: dict[Balance, float]
    rows: dict[Balance, Sequence[int]]

    def gain(self, balance: Balance) -> float:
        """How many times as fast as with equal rows."""
        return self.seconds["equal"] / self.seconds[balance]


def balanced(found: Candidate) -> Balanced:
    """Equal rows, Whale's and the exact ones."""
    total = found.study.rows
    rows: dict[Balance, Sequence[int]] = {
        "equal": equal_rows(total, found.replicas),
        "whale": rows_by_rate(found, total),
        "exact": best_rows(found, total),
    }
    return Balanced({name: found.played(each).step_s for name, each in rows.items()}, rows)


def step_s(found: Candidate) -> float:
    """Seconds of a step with equal rows."""
    return found.played(equal_rows(found.study.rows, found.replicas)).step_s


def in_stages(made: Made, cluster: str, **forced: Any) -> Tried:
    """A model cut into stages, as `whalepy plan --stages` does it."""
    options, spec = Options(optimizer=OPTIMIZER, **forced), ClusterSpec.load(cluster)
    model, _ = made
    with studied(made) as study:
        ways = chosen.forced(study, spec, options)
        staged, options = ways.staged(ways.choices[0])
    annotate(model, staged.scopes)
    with folded(model, least=LEAST_IN_STAGES) as blocks:
        if blocks.folds:
            study = Study.of(Recipe(model), made[1], OPTIMIZER, blocks)
            if blocks.stand_for_all(study.program.nodes):
                return tried_in_stages(study, spec, options, staged)
    with studied(made, fold=False) as study:
        return tried_in_stages(study, spec, options, staged)


def blocks_per_stage(model: nn.Module) -> str:
    """`9:7:5:3`, by the number of annotated modules of each stage."""
    from whalepy.primitives import scopes_on

    chains = scopes_on(model).values()
    stages = [primitive.id for chain in chains for primitive in chain if primitive.kind == "stage"]
    return ":".join(str(stages.count(one)) for one in dict.fromkeys(stages))
