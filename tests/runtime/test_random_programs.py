"""Random programs train like the local model: any composition of operators, under any scopes and shares."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.exactness import Run, differences, momentum
from tests.pool import Pool
from tests.random_programs import DRAFTS, Draft, Program, program_of, staged
from whalepy.errors import WhaleError

SOURCE = """\
# 2 ranks of 2xcpu, rows (8, 4), x [rows, 3, 4]
# whalepy.annotate(model, {'': whalepy.replicate(1)})
s1 = whalepy.split(2, shares=(1, 0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.m1 = nn.Linear(4, 4)

    def forward(self, x):
        v0 = x * 1.0
        v1 = self.m1(v0)
        with s1:
            v2 = v1.roll(1, 2)
        v3 = v2.clone()
        v3[:, 1:] += v3[:, :-1].clone()
        return v3.pow(2).mean()
"""


def run_of(program: Program) -> Run:
    """Two steps, of the program's rows; batch statistics are those of all rows."""
    options = {"sync_batchnorm": True}
    make, world, spec = program.made, program.world, program.spec
    return Run(make, program.annotated, world, spec, steps=2, optimizer=momentum, options=options)


def judged(workers: Pool, program: Program) -> str:
    """`right` or `refused`; raises, with the program's source, where anything differs from the local run."""
    try:
        found = differences(workers, run_of(program), timeout_s=30)
    except WhaleError:
        return "refused"
    except Exception as error:
        error.add_note(str(program))
        raise
    assert not found, "\n".join([*found, str(program)])
    return "right"


def check(
    workers: Pool,
    count: int,
    seed: int | None = None,
    *,
    program_of: Callable[[Draft], Program | None] = program_of,
    refused: float = 0.1,
) -> None:
    """`count` programs, the same in each run; at most a part of them may be refused."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        derandomize=seed is None,
    )
    @given(DRAFTS)
    def one(draft: Draft) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps that are tried and left out
            program = program_of(draft)
        if program is None:
            seen["nothing to train"] += 1
        else:
            seen[judged(workers, program)] += 1

    (one if seed is None else hypothesis.seed(seed)(one))()
    print(dict(seen))
    assert seen["refused"] <= refused * sum(seen.values()), seen
    assert seen["nothing to train"] <= 0.1 * sum(seen.values()), seen


def in_stages(draft: Draft) -> Program | None:
    return program_of(draft, staged)


def test_random_programs_train_like_the_local_model(workers: Pool) -> None:
    check(workers, 120)


def test_random_programs_in_stages_train_like_the_local_model(workers: Pool) -> None:
    check(workers, 60, program_of=in_stages, refused=0.2)  # a stage may happen to hold nothing that trains


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_random_programs_in_stages_train_like_the_local_model(workers: Pool, seed: int) -> None:
    check(workers, 200, seed, program_of=in_stages, refused=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_random_programs_train_like_the_local_model(workers: Pool, seed: int) -> None:
    check(workers, 200, seed)


def test_a_program_prints_as_the_source_that_runs() -> None:
    steps = (("linear", (0,) * 6), ("along", (0, 0, 0, 5, 0, 0)), ("written", (0, 6, 0, 0, 0, 0)))
    assert str(program_of(Draft(steps, (1,) * 8, (2,) * 8))) == SOURCE
