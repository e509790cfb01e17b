"""Meeting points of all ranks on the launcher's store, before and beside any process group: who is missing has a name.

A barrier of a process group needs that group; this one needs a store, and says which ranks did not come.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from whalepy.errors import ClusterError, WhaleError

_POLL_S = 0.05
_FAREWELL_S = 3.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this rank."""

    rank: int
    size: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> Launch | None:
        """None without a launcher. Raises ClusterError for figures that cannot be."""
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return None
        launch = cls(_number("RANK"), _number("WORLD_SIZE"), os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT"))
        if not launch.address or not 0 <= launch.rank < launch.size:
            what = f"the launcher says rank {launch.rank} of {launch.size} at {launch.address!r}"
            raise ClusterError(what, fix=_LAUNCH_FIX)
        return launch


class SaidTogether(ClusterError):
    """What every rank that is there raises; one of them may say it for all."""

    def __init__(self, what: str, *, at: str | None = None, fix: str | None = None, is_mine: bool = True) -> None:
        super().__init__(what, at=at, fix=fix)
        self.is_mine = is_mine


@dataclass(frozen=True)
class RollCall:
    """The meeting points of one run. `timeout_s` is how long ranks wait for each other at each."""

    store: dist.Store
    rank: int
    size: int
    timeout_s: float
    hosts_store: bool = False

    @classmethod
    def open(cls, launch: Launch, timeout_s: float) -> RollCall:
        """Connect to the launcher's store, and meet all ranks there. Raises ClusterError naming who stays away."""
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        deadline = time.monotonic() + timeout_s
        try:
            if launch.rank or hosted:
                _wait_for(launch, deadline)
            store = dist.TCPStore(
                launch.address,
                launch.port,
                is_master=launch.rank == 0 and not hosted,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (OSError, RuntimeError) as error:
            where = f"{launch.address}:{launch.port}"
            who = "the launcher" if hosted else "rank 0"
            what = f"rank {launch.rank} cannot reach {who} at {where} within {timeout_s:g} s: {_brief(error)}"
            raise ClusterError(
                what, fix="check that it started, the address, and that no firewall is between"
            ) from None
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefixed = dist.PrefixStore(f"whalepy check {run}", store)
        call = cls(prefixed, launch.rank, launch.size, timeout_s, launch.rank == 0 and not hosted)
        try:
            call.meet("start")
        except ClusterError:
            call.close()
            raise
        return call

    def close(self) -> None:
        """Leave. The rank that hosts the store leaves last, if the others do not take long."""
        with suppress(RuntimeError):
            self.store.add("left", 1)
            deadline = time.monotonic() + min(_FAREWELL_S, self.timeout_s)
            while self.hosts_store and self.store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    def step(self, name: str, run: Callable[[], _Result]) -> _Result:
        """What `run` gives, after it has run on all ranks.

        Raises SaidTogether on all ranks where it failed on one (that of the lowest such rank), and where a rank does
        not come out of it, naming that rank.
        """
        result: list[_Result] = []
        try:
            result.append(run())
        except Exception as error:
            self.store.set(f"{name}/error {self.rank}", _text(error))
            self.store.add(f"{name}/errors", 1)
        # A rank that waits inside for one that failed gives up after the timeout, and comes then.
        self.meet(name, 2 * self.timeout_s)
        if self.store.add(f"{name}/errors", 0):
            raise self._first_error(name)
        return result[0]

    def meet(self, name: str, timeout_s: float | None = None) -> None:
        """Wait for all ranks. Raises SaidTogether naming those that have not come in time."""
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            self._wait(name, wait_s)
        except RuntimeError as error:
            what = f"rank {self.rank} lost the launcher's store at {name!r}: {_brief(error)}"
            raise SaidTogether(what, fix="look at the output of rank 0 and of the launcher") from None

    def _wait(self, name: str, wait_s: float) -> None:
        self.store.set(f"{name}/here {self.rank}", socket.gethostname())
        self.store.add(f"{name}/count", 1)
        deadline = time.monotonic() + wait_s
        while self.store.add(f"{name}/count", 0) < self.size:
            if time.monotonic() > deadline:
                raise self._missing(name, wait_s)
            time.sleep(_POLL_S)

    def _missing(self, name: str, waited_s: float) -> SaidTogether:
        here = [rank for rank in range(self.size) if self.store.check([f"{name}/here {rank}"])]
        away = [rank for rank in range(self.size) if rank not in here]
        hosts = {rank: self.store.get(f"{name}/here {rank}").decode() for rank in here}
        came = ", ".join(f"{rank} ({host})" for rank, host in list(hosts.items())[:8]) + (", ..." if here[8:] else "")
        what = f"{_ranks(away)} of {self.size} did not reach {name!r} within {waited_s:g} s; there: {came}"
        fix = "look at the output of that rank: it did not start, failed, or hangs; --timeout waits longer"
        return SaidTogether(what, fix=fix, is_mine=self.rank == here[0])

    def _first_error(self, name: str) -> SaidTogether:
        failed = [rank for rank in range(self.size) if self.store.check([f"{name}/error {rank}"])]
        texts = [self.store.get(f"{name}/error {rank}").decode() for rank in failed]
        what, fix = texts[0].split("\0")
        common = len(failed) == self.size and len(set(texts)) == 1
        whose = what if common or what.startswith("rank ") else f"rank {failed[0]}: {what}"
        return SaidTogether(whose, fix=fix or None, is_mine=self.rank == 0)


def _wait_for(launch: Launch, deadline: float) -> None:
    """Until somebody listens there. Torch would wait as well, but prints its own stack when nobody comes."""
    while True:
        try:
            socket.create_connection(
                (launch.address, launch.port), timeout=max(0.1, deadline - time.monotonic())
            ).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


_LAUNCH_FIX = "start it as `torchrun --nproc-per-node=N -m whalepy check`"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ClusterError(f"the environment variable {name} is {text!r}", fix=_LAUNCH_FIX)
    return int(text)


def _text(error: Exception) -> str:
    if isinstance(error, WhaleError):
        return f"{error.what}\0{error.fix or ''}"
    return f"{type(error).__name__}: {_brief(error)}\0"


def _brief(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300].replace("\0", "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}" + (", ..." if ranks[8:] else "")
