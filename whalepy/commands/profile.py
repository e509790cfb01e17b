"""`whalepy profile`: measure the devices at hand, and under torchrun the links between them, into a cluster file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from whalepy.hardware.cluster import ClusterSpec
    from whalepy.hardware.match import RankReport
    from whalepy.runtime.measure import Step
    from whalepy.runtime.measure_links import MeasuredLinks


def profile(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a cluster file (.yaml, .yml or .json) of what was seen."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About a second, at few sizes; else about half a minute.")
    ] = False,
) -> None:
    """Measure this device: products, elementwise operators, launches, the host link; under torchrun links as well."""
    from whalepy.hardware.profile_file import check_target, file_content, measured_spec, write_profile

    if output is not None:
        check_target(output)
    import torch.distributed as dist

    from whalepy.hardware.detect import report_this_rank
    from whalepy.runtime.agreement import gather_objects, raise_together
    from whalepy.runtime.groups import start_process_group
    from whalepy.runtime.kept_memory import keep_freed_memory
    from whalepy.runtime.measure import measure_device
    from whalepy.runtime.measure_links import measure_links
    from whalepy.runtime.planning import this_device

    device = this_device()
    host = start_process_group(device)
    keep_freed_memory(device)  # as in training
    shows = host.position == 0 and not quick
    own: list[RankReport] = []
    failed: Exception | None = None
    try:
        measured = measure_device(device, quick=quick, watch=_with_progress if shows else iter)
        own.append(report_this_rank(device, measured))
    except Exception as error:  # known to all before any waits for this rank
        failed = error
    raise_together(host, failed)
    reports: list[RankReport] = gather_objects(host, own[0])
    with _status("measuring links", shows and host.size > 1):
        links = measure_links(host, [report.host for report in reports], device, quick=quick)
    if host.position == 0:
        spec = measured_spec(reports, links.inside, links.between)
        _print_summary(spec)
        try:
            if output is not None:
                write_profile(output, file_content(spec, _seen(reports, links)))
                print(f"written to {output}")
        except Exception as error:
            failed = error
    raise_together(host, failed)
    if dist.is_initialized():
        dist.destroy_process_group()


def _with_progress(steps: list[Step]) -> Iterable[Step]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, "measuring", console=console, transient=True, disable=not console.is_terminal)


def _status(text: str, shows: bool) -> AbstractContextManager[object]:
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if shows and console.is_terminal else nullcontext()


def _seen(reports: Sequence[RankReport], links: MeasuredLinks) -> dict[str, Any]:
    """Every point as [size, seconds], by rank, and among the ranks."""
    import torch

    ranks: dict[str, Any] = {}
    for rank, report in enumerate(reports):
        rows = {} if report.measured is None else {**report.measured.products, **report.measured.memory}
        points = {name: [[point.size, point.seconds] for point in row] for name, row in rows.items()}
        ranks[f"rank {rank}"] = {"host": report.host, "type": report.type, "seconds by FLOPs or bytes": points}
    collectives = {name: [[p.size, p.seconds] for p in row] for name, row in links.collectives.items()}
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        **ranks,
        **({"collectives, seconds by bytes": collectives} if collectives else {}),
    }


def _print_summary(spec: ClusterSpec) -> None:
    from rich.console import Console
    from rich.table import Table

    from whalepy.hardware.efficiency import GIB

    table = Table(box=None, header_style="bold")
    for heading in ("devices", "fp32 TFLOP/s", "fp16", "bf16", "GB/s", "launch us", "host GB/s", "GiB free", "speed"):
        table.add_column(heading, justify="left" if heading == "devices" else "right", no_wrap=True)
    for device in spec.devices:
        figures = device.profile
        marks = dict(figures.marks)
        rates = (_figure(getattr(figures, name) / 1e12, marks.get(name)) for name in ("fp32", "fp16", "bf16"))
        table.add_row(
            f"{device.index}  {device.type}",
            *rates,
            _figure(figures.memory_bandwidth / 1e9, marks.get("memory_bandwidth")),
            _figure(figures.launch_seconds * 1e6, marks.get("launch_s")),
            _figure(figures.host_link / 1e9, marks.get("host_bandwidth")),
            f"{device.memory_bytes / GIB:.4g}",
            f"{device.speed:.3g}",
        )
    console = Console(highlight=False, width=140)
    console.print(table)
    for node in spec.nodes:
        if len(node.devices) > 1:
            console.print(f"inside node {node.index}: {_link(node.link.bandwidth_bytes_per_s, node.link.latency_s)}")
    if spec.inter is not None:
        console.print(f"between nodes: {_link(spec.inter.bandwidth_bytes_per_s, spec.inter.latency_s)}")


def _figure(value: float, mark: str | None) -> str:
    """Three digits; in brackets what was not measured, and "-" for zero."""
    if not value:
        return "-"
    return f"{value:.3g}" if mark == "measured" else f"({value:.3g})"


def _link(bandwidth: float, latency_s: float) -> str:
    return f"{bandwidth / 1e9:.3g} GB/s, {latency_s * 1e6:.3g} us"
