"""The supernode as data: counts, places, instances and transfer times against the paper's figures."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.mesh import PlaneName, Supernode, plan_instances

MACHINE = Supernode.preset("cloudmatrix384")
DIES = Supernode.preset("cloudmatrix384-dies")


@pytest.mark.smoke
def test_preset_is_the_papers_machine():
    assert (MACHINE.num_nodes, MACHINE.npus_per_node, MACHINE.num_npus) == (48, 8, 384)
    assert (MACHINE.num_dies, MACHINE.num_cpus, MACHINE.num_ranks) == (768, 192, 384)
    assert (DIES.num_ranks, DIES.ranks_per_node, DIES.dies_per_rank) == (768, 16, 1)
    assert MACHINE.replace(ranks_per_npu=2, name=DIES.name) == DIES
    # 384 NPUs of 128 GB are given as 49.2 TB in all.
    assert MACHINE.num_ranks * MACHINE.rank_memory_bytes == pytest.approx(49.2e12, rel=2e-3)
    assert DIES.num_ranks * DIES.rank_memory_bytes == MACHINE.num_ranks * MACHINE.rank_memory_bytes


def test_switch_counts_and_no_oversubscription():
    switches = MACHINE.switches
    assert (MACHINE.num_l1_chips, MACHINE.num_l2_chips) == (336, 112)
    assert switches.num_links(MACHINE.num_nodes) == 5376
    # Every L2 port carries one link, so both sides count the same.
    assert switches.num_links(MACHINE.num_nodes) == switches.num_l2_chips * switches.ports_per_l2_chip
    l1_uplink_bytes_per_s = switches.l2_chips_per_subplane * switches.port_bytes_per_s
    assert l1_uplink_bytes_per_s == 448e9
    npus_bytes_per_s = MACHINE.npus_per_node * MACHINE.plane("ub").link_bytes_per_s
    assert switches.l1_chips_per_node * l1_uplink_bytes_per_s == npus_bytes_per_s == 3136e9


def test_nominal_links_agree_per_die_npu_and_node():
    assert MACHINE.dies_per_npu * MACHINE.die_ub_bytes_per_s == MACHINE.plane("ub").link_bytes_per_s == 392e9
    assert MACHINE.die_ub_bytes_per_s == 7 * 224e9 / 8
    rdma, vpc = MACHINE.plane("rdma"), MACHINE.plane("vpc")
    assert rdma.link_bytes_per_s == vpc.link_bytes_per_s == 50e9
    assert MACHINE.npus_per_node * rdma.link_bytes_per_s == 3.2e12 / 8
    assert (rdma.link_owner, vpc.link_owner) == ("npu", "node")
    assert rdma.path_figures().bytes_per_s * MACHINE.dies_per_npu == rdma.link_bytes_per_s


def test_measured_bandwidth_ratios_between_and_within_nodes():
    # The ratios that the same table prints beside its figures, to their two digits.
    printed = {
        ("npu_npu", "read"): (0.98, 1.58),
        ("npu_npu", "write"): (0.99, 1.62),
        ("npu_cpu", "read"): (0.97, 1.70),
        ("npu_cpu", "write"): (0.97, 1.73),
    }
    for (path, op), (bandwidth_ratio, latency_ratio) in printed.items():
        inter = MACHINE.plane("ub").path_figures(path, op, inter_node=True)
        intra = MACHINE.plane("ub").path_figures(path, op, inter_node=False)
        assert inter.bytes_per_s / intra.bytes_per_s == pytest.approx(bandwidth_ratio, abs=0.0051)
        assert inter.latency_s / intra.latency_s == pytest.approx(latency_ratio, abs=0.0051)
        assert inter.latency_s - intra.latency_s < 1e-6
        assert inter.bytes_per_s < MACHINE.die_ub_bytes_per_s


@pytest.mark.parametrize(
    ("machine", "rank", "node", "npu", "die"),
    [
        (MACHINE, 0, 0, 0, 0),
        (MACHINE, 7, 0, 7, 0),
        (MACHINE, 8, 1, 8, 0),
        (MACHINE, 383, 47, 383, 0),
        (DIES, 1, 0, 0, 1),
        (DIES, 19, 1, 9, 1),
        (DIES, 767, 47, 383, 1),
    ],
)
def test_location(machine, rank, node, npu, die):
    place = machine.location(rank)
    assert (place.rank, place.node, place.npu, place.die) == (rank, node, npu, die)


@given(st.integers(1, 384), st.sampled_from([1, 2]))
def test_location_and_rank_of_are_inverse(num_npus, ranks_per_npu):
    machine = Supernode.of_size(num_npus * ranks_per_npu, ranks_per_npu=ranks_per_npu)
    places = [machine.location(rank) for rank in range(machine.num_ranks)]
    assert [machine.rank_of(place.npu, place.die) for place in places] == list(range(machine.num_ranks))
    assert {place.node for place in places} == set(range(machine.num_nodes))
    # Each die belongs to exactly one rank.
    holders = [machine.rank_of(npu, die) for npu in range(machine.num_npus) for die in range(machine.dies_per_npu)]
    assert holders == sorted(holders)
    assert all(holders.count(rank) == machine.dies_per_rank for rank in set(holders))
    assert set(holders) == set(range(machine.num_ranks))


def test_places_outside_the_machine():
    with pytest.raises(ValueError, match="rank 384 is outside the 384 ranks"):
        MACHINE.location(384)
    with pytest.raises(ValueError, match="rank -1"):
        MACHINE.location(-1)
    with pytest.raises(ValueError, match="die 2"):
        MACHINE.rank_of(0, 2)
    with pytest.raises(ValueError, match="CPU 192 is outside the 192"):
        MACHINE.cpu_node(192)
    assert (MACHINE.cpu_node(3), MACHINE.cpu_node(4)) == (0, 1)


def test_transfer_time_knows_plane_direction_and_node():
    num_bytes = 1_000_000
    # Per die: latency + bytes / bandwidth, straight from the table.
    assert DIES.transfer_time_s(num_bytes, 0, 16) == pytest.approx(2.1e-6 + 1e6 / 135e9)
    assert DIES.transfer_time_s(num_bytes, 0, 15) == pytest.approx(1.3e-6 + 1e6 / 137e9)
    assert DIES.transfer_time_s(num_bytes, 0, 16, op="read") == pytest.approx(1.9e-6 + 1e6 / 164e9)
    assert DIES.transfer_time_s(num_bytes, 0, 15, op="read") == pytest.approx(1.2e-6 + 1e6 / 167e9)
    # A whole NPU has both dies' links.
    assert MACHINE.transfer_time_s(num_bytes, 0, 8) == pytest.approx(2.1e-6 + 1e6 / 270e9)
    # 400 Gbps an NPU, 200 a die; VPC's link belongs to the node, whatever a rank is.
    rdma, vpc = MACHINE.plane("rdma"), MACHINE.plane("vpc")
    latency_s = rdma.path_figures().latency_s
    assert MACHINE.transfer_time_s(num_bytes, 0, 8, plane="rdma") == pytest.approx(latency_s + 1e6 / 50e9)
    assert DIES.transfer_time_s(num_bytes, 0, 16, plane="rdma") == pytest.approx(latency_s + 1e6 / 25e9)
    vpc_time_s = vpc.path_figures().latency_s + 1e6 / 50e9
    assert MACHINE.transfer_time_s(num_bytes, 0, 8, plane="vpc") == pytest.approx(vpc_time_s)
    assert DIES.transfer_time_s(num_bytes, 0, 16, plane="vpc") == pytest.approx(vpc_time_s)


def test_transfer_of_nothing_and_to_oneself_takes_no_time():
    assert MACHINE.transfer_time_s(0, 0, 8) == 0
    assert MACHINE.transfer_time_s(1, 5, 5) == 0
    assert MACHINE.pool_transfer_time_s(0, 0, 0) == 0
    assert MACHINE.transfer_time_s(1, 0, 8) > 2.1e-6
    with pytest.raises(ValueError, match="-1"):
        MACHINE.transfer_time_s(-1, 0, 8)


def test_pool_transfer_is_capped_by_the_socket():
    # One die is slower than the socket's 160 GB/s, a whole NPU (2 x 147) would be faster.
    assert DIES.pool_transfer_time_s(1e9, 0, 191) == pytest.approx(1.7e-6 + 1e9 / 147e9)
    assert DIES.pool_transfer_time_s(1e9, 0, 3, op="write") == pytest.approx(1.1e-6 + 1e9 / 110e9)
    assert MACHINE.pool_transfer_time_s(1e9, 0, 191) == pytest.approx(1.7e-6 + 1e9 / 160e9)


def test_planes_serve_their_members_only():
    assert [plane.name for plane in MACHINE.planes] == list(get_args(PlaneName))
    with pytest.raises(ValueError, match="rdma does not serve npu_cpu/read"):
        MACHINE.plane("rdma").path_figures("npu_cpu", "read")
    with pytest.raises(ValueError, match="unknown plane 'pcie'"):
        MACHINE.plane("pcie")


def nodes_of(machine, spec):
    return {machine.location(rank).node for rank in spec.ranks}


@pytest.mark.smoke
def test_default_roles():
    specs = MACHINE.plan_instances()
    assert [(spec.name, spec.role, spec.first_rank, spec.ep_size) for spec in specs] == [
        ("prefill0", "prefill", 0, 32),
        ("prefill1", "prefill", 32, 32),
        ("decode0", "decode", 64, 320),
    ]
    assert nodes_of(MACHINE, specs[2]) == set(range(8, 48))
    # The paper's decode instance, a die a rank: 160 NPUs on 20 nodes.
    (decode,) = (spec for spec in DIES.plan_instances() if spec.role == "decode")
    assert len(nodes_of(DIES, decode)) == 20
    assert len({DIES.location(rank).npu for rank in decode.ranks}) == 160


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "expected"),
    [
        # (first rank, EP size) of the prefill instances, then of decode
        (384, (320, None, None), [(0, 32), (32, 32), (64, 320)]),
        (384, (8, None, None), [(0, 8), (8, 8), (16, 8)]),
        (384, (352, None, None), [(0, 32), (32, 352)]),
        (384, (64, 16, 3), [(0, 16), (16, 16), (32, 16), (48, 64)]),
        (8, (4, None, None), [(0, 4), (4, 4)]),
        (8, (4, 2, None), [(0, 2), (2, 2), (4, 4)]),
        # No room beside decode, or none wanted: prefill shares decode's first devices.
        (1, (None, None, None), [(0, 1), (0, 1)]),
        (8, (None, None, None), [(0, 8), (0, 8)]),
        (384, (384, None, None), [(0, 32), (0, 384)]),
        (384, (320, None, 0), [(0, 32), (0, 320)]),
        (8, (6, None, None), [(0, 6), (0, 6)]),
    ],
)
def test_plan_instances(num_ranks, sizes, expected):
    specs = plan_instances(num_ranks, *sizes)
    assert [(spec.first_rank, spec.ep_size) for spec in specs] == expected
    assert [spec.role for spec in specs] == ["prefill"] * (len(expected) - 1) + ["decode"]


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "message"),
    [
        (384, (400, None, None), "decode at EP 400 needs 400 devices, there are 384"),
        (384, (320, 32, 3), r"EP 320 beside 3 prefill instance\(s\) at EP 32 needs 416 devices, there are 384"),
        (384, (0, None, None), "the EP size is 0"),
        (384, (8, -1, None), "the prefill EP size is -1"),
        (384, (8, 8, -1), "the number of prefill instances is -1"),
        (16, (8, 32, None), "prefill at EP 32 cannot share the 8 devices"),
        (384, (8, 32, 0), "prefill at EP 32 cannot share the 8 devices"),
    ],
)
def test_plans_that_do_not_fit_say_the_numbers(num_ranks, sizes, message):
    with pytest.raises(UserError, match=message):
        plan_instances(num_ranks, *sizes)


@given(
    st.integers(1, 384),
    st.integers(1, 384),
    st.integers(1, 40),
    st.none() | st.integers(0, 4),
    st.just(1) | st.integers(1, 4),
)
def test_plans_are_disjoint_unless_they_share(num_ranks, ep_size, prefill_ep_size, num_prefill, num_decode):
    try:
        specs = plan_instances(num_ranks, ep_size, prefill_ep_size, num_prefill, num_decode)
    except UserError:
        num_alone = num_prefill or 0
        assert num_alone * prefill_ep_size + num_decode * ep_size > num_ranks or prefill_ep_size > ep_size
        return
    ranks = [rank for spec in specs for rank in spec.ranks]
    prefill, decode = specs[:-num_decode], specs[-num_decode:]
    assert [spec.name for spec in prefill] == [f"prefill{i}" for i in range(len(prefill))]
    assert [spec.name for spec in decode] == [f"decode{i}" for i in range(num_decode)]
    assert set(ranks) <= set(range(num_ranks))
    of_decode = [rank for spec in decode for rank in spec.ranks]
    assert len(set(of_decode)) == len(of_decode) == num_decode * ep_size
    if len(set(ranks)) < len(ranks):
        assert not num_prefill
        assert set(prefill[0].ranks) <= set(decode[0].ranks)


def test_decode_instances_share_the_ranks_that_there_are():
    assert [spec.ep_size for spec in plan_instances(384, num_decode_instances=2)] == [32, 192, 192]
    assert [spec.ep_size for spec in plan_instances(384, 64, num_decode_instances=3)] == [32, 32, 64, 64, 64]
    with pytest.raises(UserError, match="decode at EP 200 times 2 needs 400 devices, there are 384"):
        plan_instances(384, 200, num_decode_instances=2)
    with pytest.raises(UserError, match="the number of decode instances is 0"):
        plan_instances(384, num_decode_instances=0)


def test_of_size_and_bad_machines():
    assert (Supernode.of_size(1).num_nodes, Supernode.of_size(20).num_nodes) == (1, 3)
    assert Supernode.of_size(20).num_ranks == 20
    assert Supernode.of_size(1024).num_nodes == Supernode.of_size(1024).switches.ports_per_l2_chip == 128
    assert Supernode.of_size(384) == MACHINE.replace(name="supernode-384")
    assert Supernode.of_size(4, ranks_per_npu=2).num_npus == 2
    with pytest.raises(UserError, match="multiple of ranks_per_npu=2"):
        Supernode.of_size(5, ranks_per_npu=2)
    with pytest.raises(UserError, match="num_npus is 0"):
        MACHINE.replace(num_npus=0)
    with pytest.raises(UserError, match="does not divide the 2 dies"):
        MACHINE.replace(ranks_per_npu=3)
    with pytest.raises(UserError, match="49 nodes, but an L2 switch chip has 48 ports"):
        MACHINE.replace(num_npus=392)
    with pytest.raises(UserError, match="unknown supernode 'x'; known are cloudmatrix384, cloudmatrix384-dies"):
        Supernode.preset("x")


def test_machines_are_values():
    assert hash(MACHINE) == hash(Supernode.preset("cloudmatrix384").replace())
    assert MACHINE != DIES
    assert math.isfinite(MACHINE.transfer_time_s(1e12, 0, 383))
