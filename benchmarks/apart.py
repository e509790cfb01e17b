"""Ways to train, timed in turns, each in processes of its own, as its user would run it.

What one way has the C library, torch or the interpreter keep is then of no use, and of no harm, to another.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from benchmarks.pairs import in_turns, timed
from benchmarks.ways import Limits, Local, Timed, Way, differences

Make = Callable[[], Way]
About = Callable[[Way], Any]


def nothing(way: Way) -> None:
    """What is to be known of a way of which only the time counts."""


class Apart:
    """The process of a way on this rank; those of all ranks are a default group of their own. Collective."""

    def __init__(self, name: str, make: Make, local: Callable[[], Local], about: About) -> None:
        """Start it on the core and in the network namespace of this rank. Raises ValueError for a wrong way."""
        port: list[Any] = [_free_port() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(port)
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.apart", str(there.fileno())]
        world = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "MASTER_PORT": str(port[0])}
        self._process = subprocess.Popen(command, env={**os.environ, **world}, pass_fds=[there.fileno()])
        there.close()
        self._name, self._pipe = name, Connection(here.detach())
        self.cpu_s = 0.0
        """Seconds that cores have worked for it."""
        self._pipe.send_bytes(cloudpickle.dumps((make, local, about)))
        wrong, self.about = self._received()
        if wrong:
            raise ValueError(f"{name}: not the same loss and gradients: {wrong}")

    def timed(self) -> float:
        """Seconds of a step, of the rank that takes longest."""
        self._pipe.send(True)
        seconds, self.cpu_s = self._received()
        return seconds

    def close(self) -> None:
        self._pipe.close()
        self._process.wait()

    def _received(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise ValueError(f"the process of {self._name} failed, see what it printed") from None


def timed_ways(
    makes: Mapping[str, Make],
    local: Callable[[], Local],
    limits: Limits,
    about: About = nothing,
    beside: Callable[[Mapping[str, Any]], Mapping[str, Callable[[], object]]] = lambda _: {},
) -> Timed:
    """The times of all ways, what is to be known about each, and the times of what else is done in the same rounds.

    `beside` is given what is known, and runs in the processes of the ranks. Raises ValueError for another loss or
    gradients than the local model's, or without a round.
    """
    with ExitStack() as stack:
        ways: dict[str, Apart] = {}
        for name, make in makes.items():
            ways[name] = Apart(name, make, local, about)
            stack.callback(ways[name].close)
        known = {name: way.about for name, way in ways.items()}
        steps = {name: way.timed for name, way in ways.items()}
        steps |= {name: partial(timed, step) for name, step in beside(known).items()}
        found, repeated = in_turns(
            list(steps.values()),
            limits.pairs,
            others=limits.others,
            limit_s=limits.limit_s,
            cpu_s=lambda: time.process_time() + sum(way.cpu_s for way in ways.values()),
        )
    rounds = {"repeated_rounds": repeated, "others_at_most": limits.others}
    return Timed(dict(zip(steps, found, strict=True)), rounds, known)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _serve(pipe: Connection) -> None:
    """The life of the process of a way."""
    make, local, about = cloudpickle.loads(pipe.recv_bytes())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    way: Way = make()
    wrong = differences(way, *local())
    pipe.send((wrong, None if wrong else about(way)))
    with suppress(EOFError):
        while pipe.recv():
            pipe.send((timed(way.train, way.forget), time.process_time()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
