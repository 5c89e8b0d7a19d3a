"""The supernode: its topology and planes, virtual devices, instances, and the fabric that carries the exchanges.

`fabric` is a module of its own: `from cmjax.mesh import fabric`.
"""

from cmjax.mesh.compile_cache import programs_are_shared, share_compiled_programs
from cmjax.mesh.devices import (
    ABSENT_TPU,
    EP_AXIS,
    Instance,
    InstanceLayout,
    Pools,
    bring_up,
    carve,
    describe,
    is_crowded,
    num_cores,
    stored_width,
    virtual_devices,
)
from cmjax.mesh.memory import Memory, use_huge_pages
from cmjax.mesh.planes import LinkFigures, Operation, Path, Plane, PlaneName, UbSwitches
from cmjax.mesh.topology import InstanceSpec, Location, Role, Supernode, plan_instances

__all__ = [
    "ABSENT_TPU",
    "EP_AXIS",
    "Instance",
    "InstanceLayout",
    "InstanceSpec",
    "LinkFigures",
    "Location",
    "Memory",
    "Operation",
    "Path",
    "Plane",
    "PlaneName",
    "Pools",
    "Role",
    "Supernode",
    "UbSwitches",
    "bring_up",
    "carve",
    "describe",
    "is_crowded",
    "num_cores",
    "plan_instances",
    "programs_are_shared",
    "share_compiled_programs",
    "stored_width",
    "use_huge_pages",
    "virtual_devices",
]
