"""A saved plan, read again, and the devices that it is for."""

from __future__ import annotations

from pathlib import Path

from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.plan import Plan


def read_plan(source: Plan | str | Path) -> Plan:
    """The plan, or that in a file. Raises PlanError for a file that cannot be read, or holds no plan."""
    if isinstance(source, Plan):
        return source
    try:
        text = Path(source).read_text()
    except OSError as error:
        raise PlanError(f"the plan {source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(
            f"the plan {source} cannot be read: it is no text", fix="give a file that --save wrote"
        ) from error
    return Plan.from_json(text)


def check_devices(plan: Plan, cluster: ClusterSpec) -> None:
    """Raises PlanError for a plan whose devices are not those of the cluster, in the same order."""
    types = tuple(device.type for device in cluster.devices)
    if len(plan.device_types) != len(types):
        raise PlanError(f"the plan is for {len(plan.device_types)} devices, the cluster has {len(types)}", fix=_AGAIN)
    for index, (planned, found) in enumerate(zip(plan.device_types, types, strict=True)):
        if planned != found:
            raise PlanError(f"device {index} of the plan is {planned}, that of the cluster is {found}", fix=_AGAIN)


_SAVED = "give a file that --save wrote"
_AGAIN = "plan anew for this cluster, and save the plan"
