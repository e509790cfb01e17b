"""Ranks of this machine as hosts of their own, with a link of a given rate: network namespaces (Linux, root)."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
from collections.abc import Generator

import torch.distributed as dist

_PREFIX = "whalepy"
_SUBNET = "10.88.0"
_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""


def add_rate(parser: argparse.ArgumentParser) -> None:
    """The option for the rate of the links."""
    parser.add_argument("--rate", help="of the link of each rank, as tc has it: 1gbit; default: this machine's memory")


@contextlib.contextmanager
def hosts(count: int, rate: str | None) -> Generator[None]:
    """So many network namespaces at one switch, each of which sends at this rate (as tc has it: `1gbit`).

    None: nothing is made.
    """
    if rate is None:
        yield
        return
    bridge = f"{_PREFIX}-switch"
    remove(count)
    try:
        _ip(f"link add {bridge} type bridge")
        _ip(f"link set {bridge} up")
        for k in range(count):
            name = f"{_PREFIX}{k}"
            _ip(f"netns add {name}")
            _ip(f"link add {name}-out type veth peer name eth0 netns {name}")
            _ip(f"link set {name}-out master {bridge} up")
            _ip(f"-n {name} address add {_SUBNET}.{k + 1}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
            _run(f"tc -n {name} qdisc add dev eth0 root tbf rate {rate} burst 512kb latency 50ms")
        yield
    finally:
        remove(count)


def remove(count: int) -> None:
    """Take away what is there of them."""
    for command in (*(f"netns delete {_PREFIX}{k}" for k in range(count)), f"link delete {_PREFIX}-switch"):
        subprocess.run(["ip", *command.split()], check=False, capture_output=True)


def enter(rank: int) -> None:
    """Make this thread, and those that it starts, part of a host, before any socket is there."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{_PREFIX}{rank}") as there:
        if library.setns(there.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace of rank {rank}")
    os.environ.update(MASTER_ADDR=f"{_SUBNET}.1", GLOO_SOCKET_IFNAME="eth0")


def open_group() -> None:
    """The default group of gloo ranks, each on a host of its own; nothing where there is one already."""
    if not dist.is_initialized():
        enter(int(os.environ["RANK"]))
        dist.init_process_group("gloo")


def _ip(command: str) -> None:
    _run(f"ip {command}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
