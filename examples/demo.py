"""`make demo`: examples/train_gpt2.py on four CPU ranks of this machine, then the same training in one process.

Shows the plan, the loss as it falls, and the largest difference between the parameters of the two trainings. Exits
with 1 where that is more than rounding.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_gpt2 import BATCH, CLUSTER, LEARNING_RATE, LENGTH, MOMENTUM, STEPS, batches, compiled, small_gpt2, train

RANKS = 4
# Allowed difference, as a part of the largest change of any parameter: float32 has 7 digits, and sums are taken in
# another order on other ranks.
TOLERANCE = 1e-5
LOOPBACK = {"linux": "lo", "darwin": "lo0"}

State = dict[str, torch.Tensor]
console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error("--steps must be at least 1")
    console.print(f"[bold]{RANKS} ranks[/], cluster {CLUSTER!r}, {steps} steps of {BATCH} rows of {LENGTH} bytes")
    try:
        ranks = train_on_ranks(steps)
        return report(ranks, train_in_one_process(steps), train_in_one_process(steps, reverse=True))
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        console.print(f"[red]rank {error.error_index} failed[/]")
        console.print(str(error), markup=False)
        return 1


# --- on four ranks: what torchrun does, without its log -------------------------------------------------------------


def train_on_ranks(steps: int) -> State:
    """The parameters after training on all ranks."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state.pt"
        # Ranks inherit that they ignore ctrl-C: it is for this process, which stops them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        ranks = mp.start_processes(run_rank, (free_port(), steps, path), nprocs=RANKS, join=False)
        signal.signal(signal.SIGINT, handler)
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
            console.show_cursor()
        return torch.load(path)


def run_rank(rank: int, port: int, steps: int, path: Path) -> None:
    """The life of one rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    torch.set_num_threads(1)
    first = rank == 0
    with console.status("capturing and planning ...") if first else nullcontext():
        parallel = compiled()
    if first:
        console.print(str(parallel.plan), markup=False, soft_wrap=True)
    with progress(f"{RANKS} ranks", steps, shown=first) as watch:
        train(parallel, steps, watch)
    state = parallel.full_state_dict()
    if first:
        torch.save(state, path)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- in one process: torch alone, the same batches ------------------------------------------------------------------


def train_in_one_process(steps: int, *, reverse: bool = False) -> State:
    """The parameters after the same training without whalepy; reversed rows change only the order of sums."""
    torch.set_num_threads(1)
    model = small_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    with progress("1 process, rows reversed" if reverse else "1 process", steps) as watch:
        for step, batch in enumerate(batches(steps)):
            if reverse:
                batch = {name: value.flip(0) for name, value in batch.items()}
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watch(step, loss.item())
    return model.state_dict()


# --- showing --------------------------------------------------------------------------------------------------------


def report(ranks: State, alone: State, reordered: State) -> int:
    """Print the largest difference; 1 where it is more than the tolerance, else 0."""
    change = largest_difference(alone, small_gpt2().state_dict())
    difference = largest_difference(ranks, alone)
    rounding = largest_difference(reordered, alone)
    allowed = TOLERANCE * change
    same = difference <= allowed
    title = "Largest difference of any parameter, float32"
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    table.add_row("before and after training", f"{change:.2e}")
    table.add_row(f"{RANKS} ranks and one process", f"[bold]{difference:.2e}[/]")
    table.add_row("one process and itself with the rows of each batch reversed", f"{rounding:.2e}")
    table.add_row(f"allowed: {TOLERANCE:g} of the change", f"{allowed:.2e}")
    console.print("", table)
    console.print("[green]Equal up to rounding.[/]" if same else "[red]More than rounding: this is an error.[/]")
    return 0 if same else 1


def largest_difference(one: State, other: State) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@contextmanager
def progress(title: str, steps: int, *, shown: bool = True) -> Iterator[Callable[[int, float], None]]:
    """A progress bar; yields what tells it a step and its loss."""
    columns = (TextColumn(f"{title:24}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown) as shown_bar:
        task = shown_bar.add_task(title, total=steps, loss="-")

        def watch(step: int, loss: float) -> None:
            shown_bar.update(task, completed=step + 1, loss=f"{loss:.3f}")
            if shown and (step == 0 or (step + 1) % 10 == 0):
                console.print(f"  step {step + 1:3}  loss {loss:.3f}")

        yield watch


if __name__ == "__main__":
    sys.exit(main())
