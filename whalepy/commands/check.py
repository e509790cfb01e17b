"""`whalepy check`: under torchrun, whether a run can start: builds, ranks, groups, links; who is whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from whalepy.runtime.preflight import CheckedLink, Preflight

BAD_INPUT, NOT_AS_SAID = 2, 3


def check(
    cluster: Annotated[
        str | None, typer.Option(help="The cluster that the ranks should be: a file or one line, as for a plan.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a rank before it is named.")] = 60.0,
) -> None:
    """Check a launch before training: start it as `torchrun ... -m whalepy check --cluster SPEC`.

    Exits with 0 where all is as the cluster says, 2 where a run cannot start, 3 where a link is much slower than said.
    """
    from whalepy.hardware.cluster import ClusterSpec

    spec = None if cluster is None else ClusterSpec.load(cluster)
    from whalepy.runtime.preflight import preflight
    from whalepy.runtime.roll_call import SaidTogether

    try:
        found, rank = preflight(spec, timeout)
    except SaidTogether as error:
        if error.is_mine:
            raise
        raise typer.Exit(BAD_INPUT) from None  # another rank says it
    if rank == 0:
        _print(found)
    if found.findings:
        raise typer.Exit(NOT_AS_SAID)


def _print(found: Preflight) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=160)
    hosts = len({report.host for report in found.reports})
    ranks = len(found.reports)
    console.print(
        f"{found.spec}: {ranks} {'rank' if ranks == 1 else 'ranks'} on {hosts} {'host' if hosts == 1 else 'hosts'}, "
        f"torch {found.builds[0].torch}"
    )
    console.print(_rank_table(found))
    if found.links:
        console.print(_link_table(found.links))
    for finding in found.findings:
        console.print(f"not as the cluster says: {finding}")
    if not found.findings:
        console.print("all checks passed")


def _rank_table(found: Preflight) -> object:
    from rich.table import Table

    from whalepy.hardware.efficiency import GIB

    table = Table(box=None, header_style="bold")
    for heading in ("rank", "host", "local rank", "card", "is device", "of node", "type", "GiB free", "GiB said"):
        table.add_column(heading, no_wrap=True)
    for rank, (report, build) in enumerate(zip(found.reports, found.builds, strict=True)):
        device = found.spec.devices[found.devices[rank]]
        free, said = (f"{nbytes / GIB:.4g}" for nbytes in (report.memory_bytes, device.memory_bytes))
        table.add_row(
            str(rank), report.host, str(report.local_rank), build.device,
            str(device.index), str(device.node), device.type, free, said,
        )  # fmt: skip
    return table


def _link_table(links: tuple[CheckedLink, ...]) -> object:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("ranks", "link", "GB/s", "said", "latency us", "said", ""):
        table.add_column(heading, no_wrap=True)
    for link in links:
        said = f"{link.spec.bandwidth_bytes_per_s / 1e9:.3g} ({link.spec.origin})"
        table.add_row(
            f"{link.pair.first} - {link.pair.second}",
            "inside a node" if link.same_node else "between nodes",
            f"{link.pair.bandwidth / 1e9:.3g}",
            said,
            f"{link.pair.latency_s * 1e6:.3g}",
            f"{link.spec.latency_s * 1e6:.3g}",
            "slow" if link.is_slow else "",
        )
    return table
