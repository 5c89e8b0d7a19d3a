"""Placement: every EP size can be placed, every target holds its expert, and the paper's two layouts come out."""

import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.moe import ExpertPlacement

MODELS = [(256, 1), (16, 2), (160, 2), (64, 0), (24, 3), (5, 1)]


def plan(num_routed: int, num_shared: int, ep_size: int, **counts: int | None) -> ExpertPlacement:
    return ExpertPlacement.plan(
        num_routed_experts=num_routed, num_shared_experts=num_shared, ep_size=ep_size, num_layers=2, **counts
    )


def check(p: ExpertPlacement) -> None:
    num_logical = p.num_routed_experts + p.num_dispatched_shared
    assert p.physical_to_logical.shape == (2, p.num_physical_experts)
    assert p.expert_to_slot.shape == (2, p.ep_size, num_logical)
    assert p.num_routed_experts + p.num_redundant_experts + p.num_shared_replicas == p.num_physical_experts
    for held, targets in zip(p.physical_to_logical, p.expert_to_slot, strict=True):
        replicas = np.bincount(held, minlength=num_logical)
        assert len(replicas) == num_logical, "a slot holds an unknown expert"
        assert replicas.min() >= 1, "an expert has no slot"
        assert replicas[p.num_routed_experts :].sum() == p.num_shared_replicas
        np.testing.assert_array_equal(held[targets], np.broadcast_to(np.arange(num_logical), targets.shape))
        # A rank that holds an expert sends none of its own rows for it away.
        owner = np.arange(p.num_physical_experts) // p.num_local_experts
        np.testing.assert_array_equal(targets[owner, held] // p.num_local_experts, owner)


@pytest.mark.parametrize(("num_routed", "num_shared"), MODELS)
def test_every_ep_size(num_routed, num_shared):
    for ep_size in range(1, 385):
        p = plan(num_routed, num_shared, ep_size)
        check(p)
        by_rank = np.sort(p.physical_to_logical[0].reshape(ep_size, -1))
        assert (np.diff(by_rank) > 0).all(), f"EP {ep_size}: two copies on a rank"


@pytest.mark.parametrize(("num_routed", "num_shared"), MODELS)
def test_replicas_share_the_sources(num_routed, num_shared):
    """Each replica of an expert serves the same number of source ranks, give or take one."""
    for ep_size in (2, 3, 8, 30, 64, 128, 257, 320, 384):
        p = plan(num_routed, num_shared, ep_size)
        users = np.zeros(p.num_physical_experts, np.int64)
        np.add.at(users, p.expert_to_slot[0], 1)
        for expert in range(p.expert_to_slot.shape[-1]):
            of_expert = users[p.physical_to_logical[0] == expert]
            assert of_expert.max() - of_expert.min() <= 1, f"EP {ep_size}: {of_expert}"


def test_redundant_copies_are_spread_over_the_experts():
    for ep_size in (3, 7, 32, 100, 300, 384):
        p = plan(256, 1, ep_size)
        copies = np.bincount(p.physical_to_logical[0], minlength=257)[:256]
        assert copies.max() - copies.min() <= 1


def test_ep320_is_32_shared_256_routed_32_redundant_one_a_rank():
    p = plan(256, 1, 320)
    assert (p.num_shared_replicas, p.num_redundant_experts, p.num_local_experts) == (32, 32, 1)
    assert (p.num_experts_per_rank, p.num_dispatched_shared) == (1, 1)
    held = p.physical_to_logical[0]
    np.testing.assert_array_equal(held[:32], 256)
    np.testing.assert_array_equal(held[32:288], np.arange(256))
    assert len(set(held[288:])) == 32
    assert held[288:].max() < 256
    shared_users = np.bincount(p.expert_to_slot[0, :, 256], minlength=32)
    np.testing.assert_array_equal(shared_users, 10)


def test_ep32_has_ten_a_rank():
    p = plan(256, 1, 32)
    assert (p.num_experts_per_rank, p.num_local_experts) == (10, 9)
    assert (p.num_shared_replicas, p.num_redundant_experts, p.num_dispatched_shared) == (0, 32, 0)
    np.testing.assert_array_equal(p.physical_to_logical[0].reshape(32, 9)[:, :8].reshape(-1), np.arange(256))


def test_one_rank_holds_every_expert_once():
    p = plan(24, 3, 1)
    np.testing.assert_array_equal(p.physical_to_logical[0], np.arange(24))
    assert (p.num_experts_per_rank, p.num_redundant_experts) == (27, 0)


@pytest.mark.parametrize(
    ("ep_size", "counts", "slots"),
    [
        (320, {"num_shared_replicas": 64, "num_redundant_experts": 0}, 320),
        (320, {"num_shared_replicas": 0, "num_redundant_experts": 64}, 320),
        (320, {"num_redundant_experts": 0}, 320),
        (64, {"num_redundant_experts": 0}, 256),
        (8, {"num_redundant_experts": 8, "num_shared_replicas": 8}, 272),
        (1, {"num_redundant_experts": 3}, 259),
    ],
)
def test_explicit_counts(ep_size, counts, slots):
    p = plan(256, 1, ep_size, **counts)
    check(p)
    assert p.num_physical_experts == slots
    for name, count in counts.items():
        assert getattr(p, name) == count


@pytest.mark.parametrize(
    ("num_shared", "ep_size", "counts", "message"),
    [
        (1, 320, {"num_redundant_experts": 10, "num_shared_replicas": 32}, "do not fill 320 ranks evenly"),
        (1, 32, {"num_redundant_experts": 31}, "num_redundant_experts 32 would"),
        (1, 8, {"num_redundant_experts": -8}, "cannot be negative"),
        (1, 8, {"num_shared_replicas": -1}, "cannot be negative"),
        (0, 320, {"num_shared_replicas": 64}, "cannot hold the model's 0 shared experts"),
        (2, 257, {"num_shared_replicas": 1}, "cannot hold the model's 2 shared experts"),
        (1, 0, {}, "ep_size 0 is not positive"),
    ],
)
def test_counts_that_do_not_add_up_are_errors(num_shared, ep_size, counts, message):
    with pytest.raises(UserError, match=message):
        plan(256, num_shared, ep_size, **counts)


def test_no_experts_is_an_error():
    with pytest.raises(UserError, match="num_routed_experts 0"):
        plan(0, 1, 8)


def test_expert_load_adds_the_replicas_of_an_expert(rng):
    p = plan(24, 3, 64)
    slot_load = rng.integers(0, 50, (2, p.num_physical_experts))
    load = p.expert_load(slot_load)
    assert load.sum() == slot_load.sum()
    for layer in range(2):
        for expert in range(load.shape[1]):
            assert load[layer, expert] == slot_load[layer][p.physical_to_logical[layer] == expert].sum()
