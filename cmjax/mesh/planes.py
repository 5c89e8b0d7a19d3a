"""The three networks of a supernode, as data: who is on them, how fast they are, how long a transfer takes.

Rates are SI (1 GB/s = 1e9 bytes/s) and one way; times are seconds. Each number bears its source: [V2] and [V3] are
versions 2 and 3 of arXiv:2506.12708 (version 3 leaves most hardware figures out), [assumed] is ours, since the paper
gives none.
"""

from dataclasses import dataclass
from typing import Literal, get_args

PlaneName = Literal["ub", "rdma", "vpc"]
Path = Literal["npu_npu", "npu_cpu"]
Operation = Literal["read", "write"]

BYTES_PER_S_PER_GBPS = 1e9 / 8


@dataclass(frozen=True)
class LinkFigures:
    """What a plane reaches on one path: one-way rate of a die or a node, and the latency of a small message."""

    path: Path
    op: Operation
    inter_node: bool
    bytes_per_s: float
    latency_s: float


# Table 1 of [V2]: Unified Bus as measured; NPU figures per die, latency for 512 bytes.
UB_MEASURED = (
    LinkFigures("npu_npu", "read", True, 164e9, 1.9e-6),
    LinkFigures("npu_npu", "read", False, 167e9, 1.2e-6),
    LinkFigures("npu_npu", "write", True, 135e9, 2.1e-6),
    LinkFigures("npu_npu", "write", False, 137e9, 1.3e-6),
    LinkFigures("npu_cpu", "read", True, 147e9, 1.7e-6),
    LinkFigures("npu_cpu", "read", False, 151e9, 1.0e-6),
    LinkFigures("npu_cpu", "write", True, 107e9, 1.9e-6),
    LinkFigures("npu_cpu", "write", False, 110e9, 1.1e-6),
)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One network: its nominal link, and what is reached on each path it serves.

    `figures` are those of one die where the link belongs to the NPU (UB, RDMA), and of the whole node where it belongs
    to the node (VPC).
    """

    name: PlaneName
    protocol: str
    members: str
    uses: str
    link_bytes_per_s: float  # nominal, of one NPU or one node: see link_owner
    link_owner: Literal["npu", "node"]
    figures: tuple[LinkFigures, ...]
    source: str

    def path_figures(self, path: Path = "npu_npu", op: Operation = "write", *, inter_node: bool = True) -> LinkFigures:
        """The plane's figures for one path; ValueError when it does not serve that path."""
        for row in self.figures:
            if (row.path, row.op, row.inter_node) == (path, op, inter_node):
                return row
        served = sorted({f"{row.path}/{row.op}" for row in self.figures})
        raise ValueError(f"plane {self.name} does not serve {path}/{op}; it serves {', '.join(served)}")

    def transfer_time_s(
        self,
        num_bytes: float,
        *,
        path: Path = "npu_npu",
        op: Operation = "write",
        inter_node: bool = True,
        num_dies: float = 1,
    ) -> float:
        """Seconds until `num_bytes` have arrived: latency, then bytes over bandwidth; no bytes take no time.

        `num_dies` dies work together (2: a whole NPU of the preset); on a plane whose link belongs to the node they
        share it, so the number adds nothing there.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes is {num_bytes}, which is negative")
        if num_bytes == 0:
            return 0.0
        figures = self.path_figures(path, op, inter_node=inter_node)
        num_links = num_dies if self.link_owner == "npu" else 1
        return figures.latency_s + num_bytes / (figures.bytes_per_s * num_links)


@dataclass(frozen=True, kw_only=True)
class UbSwitches:
    """The two levels of Unified Bus switch chips: on-board L1 chip i talks to the L2 chips of sub-plane i only."""

    l1_chips_per_node: int = 7  # [V3 3.3.3]; also the number of L2 sub-planes
    l2_chips_per_subplane: int = 16  # [V3 3.3.3]; one link from each L1 chip to each of them
    ports_per_l2_chip: int = 48  # [V3 3.3.3]; one a node
    port_bytes_per_s: float = 28e9  # [V2]

    @property
    def num_subplanes(self) -> int:
        return self.l1_chips_per_node

    @property
    def num_l2_chips(self) -> int:
        return self.num_subplanes * self.l2_chips_per_subplane

    def num_l1_chips(self, num_nodes: int) -> int:
        return num_nodes * self.l1_chips_per_node

    def num_links(self, num_nodes: int) -> int:
        """Links between the two levels."""
        return self.num_l1_chips(num_nodes) * self.l2_chips_per_subplane


def _uniform(paths: tuple[Path, ...], bytes_per_s: float, latency_s: float) -> tuple[LinkFigures, ...]:
    # Reads and writes, near and far, all alike: RDMA and VPC leave the node through one port whoever the peer is.
    ops: tuple[Operation, ...] = get_args(Operation)
    return tuple(
        LinkFigures(path, op, inter_node, bytes_per_s, latency_s)
        for path in paths
        for op in ops
        for inter_node in (True, False)
    )


UB = Plane(
    name="ub",
    protocol="Unified Bus",
    members="NPUs and CPUs",
    uses="expert and tensor parallelism; pooled NPU and CPU memory",
    link_bytes_per_s=392e9,  # [V2] two dies x 7 transceivers x 224 Gbps
    link_owner="npu",
    figures=UB_MEASURED,
    source="measured, table 1 of arXiv:2506.12708v2",
)

RDMA = Plane(
    name="rdma",
    protocol="RoCE",
    members="NPUs",
    uses="KV hand-off from prefill to decode; other supernodes",
    link_bytes_per_s=400 * BYTES_PER_S_PER_GBPS,  # [V2]
    link_owner="npu",
    figures=_uniform(("npu_npu",), 200 * BYTES_PER_S_PER_GBPS, 5e-6),  # [V2] 200 Gbps a die; latency [assumed]
    source="nominal rate of arXiv:2506.12708v2; latency assumed",
)

VPC = Plane(
    name="vpc",
    protocol="Ethernet",
    members="nodes",
    uses="management; persistent storage; external services",
    link_bytes_per_s=400 * BYTES_PER_S_PER_GBPS,  # [V2]
    link_owner="node",
    figures=_uniform(("npu_npu", "npu_cpu"), 400 * BYTES_PER_S_PER_GBPS, 50e-6),  # latency [assumed]
    source="nominal rate of arXiv:2506.12708v2; latency assumed",
)
