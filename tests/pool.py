"""A pool of gloo processes for tests: started once, given a default process group of the size that each run asks for.

`Pool.run(world_size, fn, *args)` calls `fn(*args)` on ranks 0 to world_size - 1 under torchrun's environment and
returns what each rank returned, by rank. `fn` may be any function, a local one too: it travels by value.
"""

from __future__ import annotations

import faulthandler
import inspect
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

TIMEOUT_S = 120.0
# After one rank has raised, the others find their connections closed; one that still hangs is killed.
GRACE_S = 10.0
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Failure:
    when: float  # time.monotonic, one clock for all processes of the machine
    error: BaseException
    trace: str


@dataclass
class Worker:
    rank: int
    process: Any
    pipe: Connection
    stacks: Path


class Pool:
    """Workers are started when first needed, and all of them anew after a hang or a crash."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._directory = tempfile.TemporaryDirectory()
        self._runs = 0

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout_s: float = TIMEOUT_S,
        default_group: bool = True,
    ) -> list[Any]:
        """What `fn(*args)` returned on each rank.

        The error of the rank that failed first is raised here with that rank's traceback as a note; a run that takes
        longer than `timeout_s` is killed and raises TimeoutError with the stacks of the ranks that hung. Without
        `default_group` the environment is set, but no process group is open.
        """
        self._runs += 1
        workers = self._started(world_size)
        job = Job(world_size, default_group, f"run{self._runs}", _free_port(), _by_value(fn, args))
        for worker in workers:
            worker.pipe.send(job)
        return _results(self._answers(workers, timeout_s))

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers = []

    def _started(self, count: int) -> list[Worker]:
        if not all(worker.process.is_alive() for worker in self._workers):
            self.close()
        spawn = multiprocessing.get_context("spawn")
        for rank in range(len(self._workers), count):
            here, there = spawn.Pipe()
            stacks = Path(self._directory.name) / f"stacks{rank}"
            process = spawn.Process(target=_serve, args=(rank, there, self._store.port, str(stacks)), daemon=True)
            process.start()
            there.close()
            self._workers.append(Worker(rank, process, here, stacks))
        return self._workers[:count]

    def _answers(self, workers: list[Worker], timeout_s: float) -> dict[int, Any]:
        """What each rank answered; a rank that hangs or crashes answers a Failure, and a hang ends the pool."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        waiting: dict[Any, Worker] = {worker.pipe: worker for worker in workers}
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                worker = waiting.pop(pipe)
                answers[worker.rank] = _received(worker)
                if isinstance(answers[worker.rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for worker in waiting.values():
            answers[worker.rank] = _hung(worker, timeout_s)
        if waiting:
            self.close()
        return answers


@dataclass(frozen=True)
class Job:
    world_size: int
    default_group: bool
    name: str
    port: int
    call: bytes


def _by_value(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes. What the test module itself defines goes by value: workers need not import it."""
    module = inspect.getmodule(fn)
    path = getattr(module, "__file__", None)
    if module is None or path is None or TESTS not in Path(path).parents:
        return cloudpickle.dumps((fn, args))
    cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps((fn, args))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _received(worker: Worker) -> Any:
    try:
        return cloudpickle.loads(worker.pipe.recv_bytes())
    except (EOFError, OSError):
        worker.process.join(timeout=5)
        error = RuntimeError(f"rank {worker.rank} died with exit code {worker.process.exitcode}")
        return Failure(time.monotonic(), error, "")


def _hung(worker: Worker, timeout_s: float) -> Failure:
    os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    stacks = worker.stacks.read_text() if worker.stacks.exists() else ""
    error = TimeoutError(f"rank {worker.rank} hangs: no answer within {timeout_s:g} s, or after another rank failed")
    return Failure(time.monotonic(), error, stacks)


def _results(answers: dict[int, Any]) -> list[Any]:
    failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
    if not failures:
        return [answers[rank] for rank in sorted(answers)]
    rank, first = min(failures.items(), key=lambda item: (item[1].when, item[0]))
    first.error.add_note(f"on rank {rank} of {len(answers)} (failed: {sorted(failures)}):\n{first.trace}")
    raise first.error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, pipe: Connection, store_port: int, stacks: str) -> None:
    """The life of one worker."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send_bytes(_answer(rank, job, store))


def _answer(rank: int, job: Job, store: dist.Store) -> bytes:
    """The pickled result of the job, or its Failure. The default group is closed either way: a rank that still waits
    for one that failed finds out at once."""
    try:
        return cloudpickle.dumps(_call(rank, job, store))
    except BaseException as error:  # a worker outlives whatever a test does
        failure = Failure(time.monotonic(), error, traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    try:
        answer = cloudpickle.dumps(failure)
        cloudpickle.loads(answer)
        return answer
    except Exception:
        error = RuntimeError(f"{type(failure.error).__name__}: {failure.error}")
        return cloudpickle.dumps(Failure(failure.when, error, failure.trace))


def _call(rank: int, job: Job, store: dist.Store) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
    )
    fn, args = cloudpickle.loads(job.call)
    if job.default_group:
        run_store = dist.PrefixStore(job.name, store)
        dist.init_process_group("gloo", store=run_store, rank=rank, world_size=job.world_size)
    torch.manual_seed(0)
    return fn(*args)
