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
        raise PlanError(f"the plan {source} cannot be read: it is no text", fix=_SAVED) from error
    return Plan.from_json(text)


def check_devices(plan: Plan, cluster: ClusterSpec) -> None:
    """Raises PlanError for a plan whose devices are not those of the cluster, in the same order."""
    types = tuple(device.type for device in cluster.devices)
    if plan.devices != len(types):
        raise PlanError(f"the plan is for {plan.devices} devices, the cluster has {len(types)}", fix=_AGAIN)
    known = {d: kind for stage in plan.stages for d, kind in zip(stage.devices, stage.device_types, strict=True)}
    for index, planned in sorted(known.items()):
        if planned != types[index]:
            raise PlanError(
                f"device {index} of the plan is {planned}, that of the cluster is {types[index]}", fix=_AGAIN
            )


_SAVED = "give a file that --save wrote"
_AGAIN = "give the cluster that it was planned for, or plan anew for this one"
