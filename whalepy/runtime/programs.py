"""The programs of all ranks as text, and their verification, at the sizes of the example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy

from whalepy.planner.decide import Decisions
from whalepy.program.analysis import Program
from whalepy.rewrite.exchanges import collect
from whalepy.rewrite.explain import explain_text
from whalepy.rewrite.printing import RankProgram, Ranks, program_text, rank_program
from whalepy.rewrite.rewrite import Rewritten
from whalepy.rewrite.sizes import Coordinates, SizesAt
from whalepy.rewrite.verify import verify
from whalepy.runtime.build import Analysed
from whalepy.runtime.extents import Extents, Grid, chunk
from whalepy.runtime.steps import batch_symbols, rows_in, sizes_of_microbatch


def example_sizes(program: Program, decisions: Decisions, microbatches: int = 1) -> SizesAt:
    """Sizes of the first microbatch of the example inputs, for the rank at given coordinates."""
    hints: Mapping[sympy.Symbol, int] = program.hints
    grid = Grid(decisions.mesh, decisions.cuts, decisions.row_cuts)
    table = grid.rows(rows_in(program.captured, hints))
    rows = {at: chunk(count, microbatches, 0)[1] for at, count in table.items()}
    sizes = sizes_of_microbatch(hints, batch_symbols(program.captured), rows, first=True)

    def at(coordinates: Coordinates) -> Extents:
        return Extents(grid, coordinates, sizes)

    return at


def programs_of(main: Analysed, rank_of: Sequence[int], microbatches: int = 1) -> Callable[[int], RankProgram]:
    """Makes the program of a rank; for microbatches, below what is computed of the whole batch before them."""
    ranks = Ranks(main.chains, tuple(rank_of))
    sizes_at = example_sizes(main.program, main.decisions, microbatches)

    def of(rank: int) -> RankProgram:
        made = rank_program(main.rewritten, main.program, main.decisions, ranks, rank, sizes_at)
        if main.prologue is None:
            return made
        program, decisions, rewritten = main.prologue
        ahead = program_text(rewritten, program, decisions, ranks, rank, example_sizes(program, decisions))
        return replace(made, text=f"once per step, on the whole batch:\n{ahead}\n\nper microbatch:\n{made.text}")

    return of


def notes_of(main: Analysed) -> tuple[str, ...]:
    """What runs replicated for want of a rule, along which classes split scopes were cut, and what of the model the
    capture does not keep; a line each."""
    found = explain_text(main.program, main.decisions, main.chains).splitlines()
    return (*found, *main.program.captured.warnings)


def verify_ranks(main: Analysed, rank_of: Sequence[int], microbatches: int = 1) -> None:
    """Verify the programs of all ranks together. Raises VerificationError."""
    _verify(main.program, main.decisions, main.rewritten, rank_of, microbatches, backward=True)
    if main.prologue is not None:
        _verify(*main.prologue, rank_of, 1, backward=False)


def _verify(
    program: Program,
    decisions: Decisions,
    rewritten: Rewritten,
    rank_of: Sequence[int],
    microbatches: int,
    *,
    backward: bool,
) -> None:
    sizes_at = example_sizes(program, decisions, microbatches)
    verify(collect(rewritten, program, decisions.mesh, rank_of, sizes_at, backward=backward))
