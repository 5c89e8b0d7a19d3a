"""The supernode as data: what it is made of, where a rank sits, how instances divide it, what a transfer costs.

Plain Python: the scheduler, the simulator and the command line all ask here, without JAX. A *rank* is one virtual
device; it stands for a whole NPU (`ranks_per_npu=1`, the default) or for one of its dies (2, as the paper deploys).
Ranks are numbered node by node, NPU by NPU, die by die. Sources of the numbers are marked as in `planes`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cmjax.errors import UserError
from cmjax.mesh.planes import RDMA, UB, VPC, Operation, Plane, PlaneName, UbSwitches
from cmjax.schedule import Role

DEFAULT_EP_SIZE = 320  # [V3 4.1] 32 shared replicas + 256 routed + 32 redundant experts, one a rank
MAX_DEFAULT_PREFILL_EP_SIZE = 32  # [V3 4.1] a prefill instance is EP32
MAX_DEFAULT_PREFILL_INSTANCES = 2  # 320 + 2 x 32 = 384


@dataclass(frozen=True)
class Location:
    """Where a rank sits. All numbers count from 0; `npu` and `die` count within the whole machine and the NPU."""

    rank: int
    node: int
    npu: int
    die: int  # the first of the rank's dies


@dataclass(frozen=True, kw_only=True)
class InstanceSpec:
    """A contiguous range of ranks with one role; `devices.Instance` is the same with JAX devices in it."""

    name: str
    role: Role
    first_rank: int
    ep_size: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.ep_size)


@dataclass(frozen=True, kw_only=True)
class Supernode:
    """A CloudMatrix384-class machine of any size. Figures of the NPU and the node default to the paper's."""

    name: str
    num_npus: int
    ranks_per_npu: int = 1
    npus_per_node: int = 8  # [V3 3.3]
    dies_per_npu: int = 2  # [V3 3.3]
    cpus_per_node: int = 4  # [V3 3.3] Kunpeng sockets
    cpu_ub_bytes_per_s: float = 160e9  # [V2] one socket, one way
    die_ub_bytes_per_s: float = 196e9  # [V2] 7 transceivers x 224 Gbps
    die_sibling_bytes_per_s: float = 270e9  # [V2] between the dies of a package, each way
    die_memory_bytes: int = 64_000_000_000  # [V2] SI: 384 x 128 GB is given as 49.2 TB
    die_memory_bytes_per_s: float = 1.6e12  # [V2]
    switches: UbSwitches = field(default_factory=UbSwitches)
    planes: tuple[Plane, ...] = (UB, RDMA, VPC)

    def __post_init__(self) -> None:
        for name in ("num_npus", "ranks_per_npu", "npus_per_node", "dies_per_npu", "cpus_per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dies_per_npu % self.ranks_per_npu:
            raise UserError(
                f"ranks_per_npu={self.ranks_per_npu} does not divide the {self.dies_per_npu} dies of an NPU"
            )
        if self.num_nodes > self.switches.ports_per_l2_chip:
            raise UserError(
                f"{self.num_npus} NPUs are {self.num_nodes} nodes, but an L2 switch chip has "
                f"{self.switches.ports_per_l2_chip} ports, one a node"
            )

    @classmethod
    def preset(cls, name: str) -> "Supernode":
        """A machine by name: `cloudmatrix384` (a rank is an NPU), `cloudmatrix384-dies` (a rank is a die)."""
        if name not in PRESETS:
            raise UserError(f"unknown supernode {name!r}; known are {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def of_size(cls, num_ranks: int, *, ranks_per_npu: int = 1) -> "Supernode":
        """A machine of the preset's parts with exactly `num_ranks` ranks; its last node may be part-filled.

        Beyond 48 nodes it is a machine that nobody has built: its L2 switch chips get a port for each node.
        """
        if num_ranks < 1 or num_ranks % ranks_per_npu:
            raise UserError(
                f"num_ranks is {num_ranks}; it must be a positive multiple of ranks_per_npu={ranks_per_npu}"
            )
        num_npus = num_ranks // ranks_per_npu
        num_ports = max(UbSwitches().ports_per_l2_chip, -(-num_npus // cls.npus_per_node))
        return cls(
            name=f"supernode-{num_npus}",
            num_npus=num_npus,
            ranks_per_npu=ranks_per_npu,
            switches=UbSwitches(ports_per_l2_chip=num_ports),
        )

    def replace(self, **changes: Any) -> "Supernode":
        """The same machine with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        return self.num_npus * self.ranks_per_npu

    @property
    def num_nodes(self) -> int:
        return -(-self.num_npus // self.npus_per_node)

    @property
    def num_dies(self) -> int:
        return self.num_npus * self.dies_per_npu

    @property
    def num_cpus(self) -> int:
        return self.num_nodes * self.cpus_per_node

    @property
    def ranks_per_node(self) -> int:
        return self.npus_per_node * self.ranks_per_npu

    @property
    def dies_per_rank(self) -> int:
        return self.dies_per_npu // self.ranks_per_npu

    @property
    def rank_memory_bytes(self) -> int:
        return self.dies_per_rank * self.die_memory_bytes

    @property
    def num_l1_chips(self) -> int:
        return self.switches.num_l1_chips(self.num_nodes)

    @property
    def num_l2_chips(self) -> int:
        return self.switches.num_l2_chips

    # -- places ------------------------------------------------------------------------------------------------------

    def location(self, rank: int) -> Location:
        """Node, NPU and die of a rank. With 8 NPUs a node and 2 ranks an NPU, rank 19 is node 1, NPU 9, die 1."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is outside the {self.num_ranks} ranks of {self.name}")
        npu, place = divmod(rank, self.ranks_per_npu)
        return Location(rank, npu // self.npus_per_node, npu, place * self.dies_per_rank)

    def rank_of(self, npu: int, die: int = 0) -> int:
        """The rank that holds a die: the inverse of `location`."""
        if not 0 <= npu < self.num_npus or not 0 <= die < self.dies_per_npu:
            raise ValueError(f"NPU {npu}, die {die} is outside {self.name}")
        return npu * self.ranks_per_npu + die // self.dies_per_rank

    def cpu_node(self, cpu: int) -> int:
        """The node that a CPU socket is on."""
        if not 0 <= cpu < self.num_cpus:
            raise ValueError(f"CPU {cpu} is outside the {self.num_cpus} CPUs of {self.name}")
        return cpu // self.cpus_per_node

    # -- costs -------------------------------------------------------------------------------------------------------

    def plane(self, name: PlaneName) -> Plane:
        for plane in self.planes:
            if plane.name == name:
                return plane
        raise ValueError(f"unknown plane {name!r}; {self.name} has {', '.join(plane.name for plane in self.planes)}")

    def transfer_time_s(
        self,
        num_bytes: float,
        source_rank: int,
        destination_rank: int,
        *,
        plane: PlaneName = "ub",
        op: Operation = "write",
    ) -> float:
        """Seconds for one transfer between two ranks with the plane to itself; 0 from a rank to itself.

        `op` says who moves the data: the source writes it, or the destination reads it. Between the two dies of one NPU
        UB's figures within a node are an upper bound, since no measurement of that hop is published.
        """
        source, destination = self.location(source_rank), self.location(destination_rank)
        if source_rank == destination_rank:
            return 0.0
        return self.plane(plane).transfer_time_s(
            num_bytes, op=op, inter_node=source.node != destination.node, num_dies=self.dies_per_rank
        )

    def pool_transfer_time_s(self, num_bytes: float, rank: int, cpu: int, *, op: Operation = "read") -> float:
        """Seconds for a rank to read from (or write to) the memory of a CPU socket over UB.

        Capped by the socket's own link, which one whole NPU can fill.
        """
        inter_node = self.location(rank).node != self.cpu_node(cpu)
        unified_bus = self.plane("ub")
        by_rank = unified_bus.transfer_time_s(
            num_bytes, path="npu_cpu", op=op, inter_node=inter_node, num_dies=self.dies_per_rank
        )
        latency_s = unified_bus.path_figures("npu_cpu", op, inter_node=inter_node).latency_s
        return max(by_rank, latency_s + num_bytes / self.cpu_ub_bytes_per_s) if num_bytes else 0.0

    # -- instances ---------------------------------------------------------------------------------------------------

    def plan_instances(
        self,
        ep_size: int | None = None,
        prefill_ep_size: int | None = None,
        num_prefill_instances: int | None = None,
        num_decode_instances: int = 1,
    ) -> tuple[InstanceSpec, ...]:
        """Prefill instances first, then decode; see `plan_instances`."""
        return plan_instances(self.num_ranks, ep_size, prefill_ep_size, num_prefill_instances, num_decode_instances)


def plan_instances(
    num_ranks: int,
    ep_size: int | None = None,
    prefill_ep_size: int | None = None,
    num_prefill_instances: int | None = None,
    num_decode_instances: int = 1,
) -> tuple[InstanceSpec, ...]:
    """Divide `num_ranks` ranks: prefill instances from rank 0 up, then decode instances. At least one of each role.

    `ep_size` is a decode instance's (default: 320, or an equal share of the ranks where there are fewer),
    `prefill_ep_size` defaults to min(ep_size, 32), `num_prefill_instances` to what fits beside decode, at most 2. The
    instances are disjoint, except when `num_prefill_instances` is 0, or nothing fits: then one prefill instance,
    `prefill0`, *shares* the first ranks of `decode0`. UserError, with the numbers, where a wish does not fit.
    """
    wishes = {"EP size": ep_size, "prefill EP size": prefill_ep_size}
    for what, wish in wishes.items():
        if wish is not None and wish < 1:
            raise UserError(f"the {what} is {wish}; it must be at least 1")
    if num_prefill_instances is not None and num_prefill_instances < 0:
        raise UserError(f"the number of prefill instances is {num_prefill_instances}; it must not be negative")
    if num_decode_instances < 1:
        raise UserError(f"the number of decode instances is {num_decode_instances}; it must be at least 1")
    if ep_size is None:
        ep_size = max(1, min(DEFAULT_EP_SIZE, num_ranks // num_decode_instances))
    prefill_ep_size = min(ep_size, MAX_DEFAULT_PREFILL_EP_SIZE) if prefill_ep_size is None else prefill_ep_size
    if num_prefill_instances is None:
        fitting = max(num_ranks - num_decode_instances * ep_size, 0) // prefill_ep_size
        num_prefill_instances = min(fitting, MAX_DEFAULT_PREFILL_INSTANCES)
    first_decode_rank = num_prefill_instances * prefill_ep_size
    needed = first_decode_rank + num_decode_instances * ep_size
    if needed > num_ranks:
        times = f" times {num_decode_instances}" if num_decode_instances > 1 else ""
        beside = f" beside {num_prefill_instances} prefill instance(s) at EP {prefill_ep_size}"
        raise UserError(
            f"decode at EP {ep_size}{times}{beside if num_prefill_instances else ''} needs {needed} devices, there are "
            f"{num_ranks}: lower the EP sizes or the numbers of instances (0 of prefill share decode's devices)"
        )
    if num_prefill_instances == 0 and prefill_ep_size > ep_size:
        raise UserError(
            f"prefill at EP {prefill_ep_size} cannot share the {ep_size} devices of the decode instance: lower the "
            f"prefill EP size to {ep_size} or less, or give prefill devices of its own (there are {num_ranks} in all)"
        )
    prefill = tuple(
        InstanceSpec(name=f"prefill{i}", role="prefill", first_rank=i * prefill_ep_size, ep_size=prefill_ep_size)
        for i in range(max(num_prefill_instances, 1))
    )
    decode = tuple(
        InstanceSpec(name=f"decode{i}", role="decode", first_rank=first_decode_rank + i * ep_size, ep_size=ep_size)
        for i in range(num_decode_instances)
    )
    return prefill + decode


CLOUDMATRIX384 = Supernode(name="cloudmatrix384", num_npus=384)  # [V3 3.3] 48 nodes x 8

PRESETS = {
    "cloudmatrix384": CLOUDMATRIX384,
    "cloudmatrix384-dies": CLOUDMATRIX384.replace(name="cloudmatrix384-dies", ranks_per_npu=2),
}
