"""The checks before a run: builds against cards, all ranks there, groups, who is whom, each link against the spec.

The branches for CUDA are written after its documentation and have not run yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import match_ranks, report_this_rank, spec_from_reports
from whalepy.hardware.links import Link
from whalepy.hardware.match import RankReport
from whalepy.hardware.profiles import profile
from whalepy.hardware.wheels import builds_for, runs_on, torch_release
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import Group
from whalepy.runtime.measure_pairs import Pair, measure_pairs, pairs_to_measure
from whalepy.runtime.planning import this_device
from whalepy.runtime.roll_call import Launch, RollCall

# A link that reaches less than this part of what the spec says is a finding.
ENOUGH = 0.5


@dataclass(frozen=True)
class Build:
    """The torch of one rank and the card it drives."""

    torch: str
    device: str  # what torch calls it
    capability: str  # compute capability or gfx name; empty for a CPU
    architectures: tuple[str, ...]  # that the build has kernels for, as wheels.csv writes them
    uuid: str  # of the card; empty for a CPU


@dataclass(frozen=True)
class CheckedLink:
    """A pair of ranks, what was measured between them, and what the spec says."""

    pair: Pair
    spec: Link
    same_node: bool

    @property
    def is_slow(self) -> bool:
        return self.pair.bandwidth < ENOUGH * self.spec.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Preflight:
    """What was found; `devices[rank]` is the index of the device in the spec."""

    spec: ClusterSpec
    builds: tuple[Build, ...]
    reports: tuple[RankReport, ...]
    devices: tuple[int, ...]
    links: tuple[CheckedLink, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """What is not as the user said, one sentence each; figures that nobody gave are no promise."""
        return tuple(
            f"ranks {link.pair.first} and {link.pair.second}: {link.pair.bandwidth / 1e9:.3g} GB/s, "
            f"{link.pair.bandwidth / link.spec.bandwidth_bytes_per_s:.0%} of the spec"
            for link in self.links
            if link.is_slow and link.spec.origin in ("given", "measured")
        )


def preflight(cluster: ClusterSpec | None, timeout_s: float) -> tuple[Preflight, int]:
    """What the checks found, the same on every rank, and this rank's number. Opens and closes a process group.

    Raises SaidTogether, the same on every rank that is there: a rank that does not come or hangs, a torch build without
    kernels for its card, ranks that share a card, groups that do not open, ranks that do not match the cluster.
    """
    launch = Launch.from_environment()
    if launch is None or launch.size == 1:
        device = _device()
        build, report = build_here(device), report_this_rank(device)
        check_builds([build], [report], cluster)
        return _result(cluster, [build], [report], []), 0
    call = RollCall.open(launch, timeout_s)
    try:
        return _together(call, cluster), launch.rank
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        call.close()


def _together(call: RollCall, cluster: ClusterSpec | None) -> Preflight:
    device = call.step("devices", _device)
    host = call.step("process group", lambda: _open(call, device))
    builds = call.step("builds", lambda: gather_objects(host, build_here(device)))
    reports: list[RankReport] = call.step("reports", lambda: gather_objects(host, report_this_rank(device)))
    call.step("cards", lambda: check_builds(builds, reports, cluster))
    found = call.step("match", lambda: _result(cluster, builds, reports, []))
    if device.type == "cuda":
        call.step("first all-reduce", lambda: _first_all_reduce(call, device))
    rounds = pairs_to_measure(_nodes(found))
    own = call.step("links", lambda: measure_pairs(rounds, call.rank, device, call.meet))
    pairs = chain.from_iterable(call.step("results", lambda: gather_objects(host, own)))
    return _result(cluster, builds, reports, sorted(pairs, key=lambda pair: (pair.first, pair.second)))


def build_here(device: torch.device) -> Build:
    """The torch of this process, and the card that it drives."""
    if device.type != "cuda":
        return Build(str(torch.__version__), "cpu", "", (), "")
    properties = torch.cuda.get_device_properties(device)
    gfx = str(getattr(properties, "gcnArchName", "")).partition(":")[0] if torch.version.hip else ""
    return Build(
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(device),
        capability=gfx or f"{properties.major}.{properties.minor}",
        architectures=tuple(map(architecture, torch.cuda.get_arch_list())),
        uuid=str(getattr(properties, "uuid", "")),
    )


def architecture(name: str) -> str:
    """`8.6` for sm_86, `12.0+PTX` for compute_120; a gfx name as it is."""
    kind, _, digits = name.partition("_")
    digits = digits.rstrip("af")  # sm_90a: for 9.0 alone
    if kind not in ("sm", "compute") or not digits.isdecimal():
        return name
    return f"{digits[:-1]}.{digits[-1]}" + ("+PTX" if kind == "compute" else "")


def check_builds(builds: Sequence[Build], reports: Sequence[RankReport], cluster: ClusterSpec | None) -> None:
    """Raises ClusterError where torch has no kernels for a card, two ranks drive one card, or versions differ."""
    for rank, build in enumerate(builds):
        if build.capability and not runs_on(build.capability, build.architectures):
            what = f"rank {rank}: torch {build.torch} has no kernels for {build.device} ({build.capability})"
            raise ClusterError(what, fix=_wheel_fix(build.device))
    versions = {build.torch.partition("+")[0]: rank for rank, build in reversed(list(enumerate(builds)))}
    if len(versions) > 1:
        told = ", ".join(f"{version} on rank {rank}" for version, rank in versions.items())
        raise ClusterError(f"ranks have different versions of torch: {told}", fix="install one version everywhere")
    driven: dict[tuple[str, str], int] = {}
    for rank, (build, report) in enumerate(zip(builds, reports, strict=True)):
        first = driven.setdefault((report.host, build.uuid), rank)
        if build.uuid and first != rank:
            fix = "start one rank per card, and let CUDA_VISIBLE_DEVICES show each rank its own or all of them"
            raise ClusterError(f"ranks {first} and {rank} drive the same card of {report.host}", fix=fix)
    cards = cluster is not None and any(device.profile.vendor != "CPU" for device in cluster.devices)
    if cards and all(not build.capability for build in builds):
        what = f"the cluster has cards, but torch {builds[0].torch} sees none on any rank"
        raise ClusterError(what, fix="install a torch build for them, and check the driver")


def _wheel_fix(device: str) -> str:
    try:
        builds = builds_for(profile(device), torch_release())
    except ClusterError:
        builds = ()
    where = ", ".join(f"https://download.pytorch.org/whl/{build}" for build in builds)
    return f"install torch {torch_release()} from {where}" if builds else "build torch from source for it"


def _device() -> torch.device:
    """The device of this rank. Raises ClusterError where the host has fewer cards than ranks."""
    cards, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local >= cards:
        what = f"local rank {local} has no card: torch sees {cards} on its host"
        raise ClusterError(what, fix=f"start at most {cards} ranks there")
    return this_device()


def _open(call: RollCall, device: torch.device) -> Group:
    """All ranks, for messages between hosts; the default group serves the devices."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=call.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, store=call.store, rank=call.rank, world_size=call.size, timeout=timeout)
        ranks = tuple(range(call.size))
        group: Any = dist.group.WORLD if backend == "gloo" else dist.new_group(ranks, backend="gloo", timeout=timeout)
        dist.monitored_barrier(group, timeout, wait_all_ranks=True)
    except RuntimeError as error:
        brief = str(error).strip().partition("\n")[0]
        fix = "check the network between the hosts; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface"
        raise ClusterError(f"the process group does not open: {brief}", fix=fix) from None
    return Group(group, call.size, call.rank, ranks)


def _first_all_reduce(call: RollCall, device: torch.device) -> None:
    """NCCL connects at its first collective, and hangs there if it cannot: that is told apart from what follows."""
    x = torch.ones(1, device=device)
    dist.all_reduce(x)
    torch.cuda.synchronize(device)
    if x.item() != call.size:
        raise ClusterError(
            f"an all-reduce of ones over {call.size} ranks gave {x.item():g}", fix="check NCCL and drivers"
        )


def _result(
    cluster: ClusterSpec | None, builds: Sequence[Build], reports: Sequence[RankReport], pairs: Sequence[Pair]
) -> Preflight:
    spec = spec_from_reports(reports) if cluster is None else cluster
    devices = match_ranks(spec, reports)
    links = tuple(
        CheckedLink(
            pair,
            spec.link(devices[pair.first], devices[pair.second]),
            spec.devices[devices[pair.first]].node == spec.devices[devices[pair.second]].node,
        )
        for pair in pairs
    )
    return Preflight(spec, tuple(builds), tuple(reports), devices, links)


def _nodes(found: Preflight) -> list[list[int]]:
    """The ranks of each node of the spec, in its order."""
    nodes: dict[int, list[int]] = {node.index: [] for node in found.spec.nodes}
    for rank, device in enumerate(found.devices):
        nodes[found.spec.devices[device].node].append(rank)
    return list(nodes.values())
