"""Which physical expert sits in which slot of which rank, and which replica a source rank sends to.

Logical experts `0 .. E-1` are the routed ones, `E .. E+n-1` the shared MLP cut into n experts of the routed width
(only where the shared expert has ranks of its own). A slot holds one physical expert; rank r owns the slots
`[r * num_local_experts, (r+1) * num_local_experts)`. The paper's decode instance (section 2) is 32 shared replicas,
then 256 routed experts, then 32 redundant ones, one a rank; its prefill instance has ten a rank: the shared expert and
nine slots, eight routed and one redundant.
"""

import dataclasses

import numpy as np

from cmjax.errors import UserError

# Of the slots of an instance whose shared expert has ranks of its own, the share given to each shared expert: every
# token visits it, so it needs far more replicas than a routed one (the paper: 32 of 320).
_SHARED_SLOT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertPlacement:
    """The maps between logical experts and slots, for every MoE layer.

    Attributes:
        num_routed_experts: E.
        num_shared_experts: n, the width of the shared MLP in routed experts; 0 when there is none.
        ep_size: number of ranks.
        num_local_experts: slots a rank.
        num_shared_replicas: slots that hold shared experts; 0 when every rank runs the shared MLP itself.
        physical_to_logical: `int32[moe_layers, ep_size * num_local_experts]`.
        expert_to_slot: `int32[moe_layers, ep_size, logical]`: the slot that source rank r sends a choice of a logical
            expert to. Example: with two replicas of expert 5 in slots 7 and 30, the owner of either uses its own, and
            the other ranks send to 7 and 30 by turns.
    """

    num_routed_experts: int
    num_shared_experts: int
    ep_size: int
    num_local_experts: int
    num_shared_replicas: int
    physical_to_logical: np.ndarray
    expert_to_slot: np.ndarray

    @property
    def num_physical_experts(self) -> int:
        """Slots in all."""
        return self.ep_size * self.num_local_experts

    @property
    def num_redundant_experts(self) -> int:
        """Routed slots beyond the first copy of each expert."""
        return self.num_physical_experts - self.num_shared_replicas - self.num_routed_experts

    @property
    def num_dispatched_shared(self) -> int:
        """Shared experts reached through dispatch: n, or 0 when every rank runs the shared MLP itself."""
        return self.num_shared_experts if self.num_shared_replicas else 0

    @property
    def num_experts_per_rank(self) -> int:
        """Experts a rank holds, its own copy of the shared MLP counted (the paper's "ten experts a rank")."""
        return self.num_local_experts + (self.num_shared_experts if not self.num_shared_replicas else 0)

    def expert_load(self, slot_load: np.ndarray) -> np.ndarray:
        """Sum tokens by slot, `[moe_layers, slots]`, to tokens by logical expert, `int64[moe_layers, logical]`."""
        load = np.zeros((slot_load.shape[0], self.expert_to_slot.shape[-1]), np.int64)
        for layer, counts in enumerate(slot_load):
            np.add.at(load[layer], self.physical_to_logical[layer], counts)
        return load

    @classmethod
    def plan(
        cls,
        *,
        num_routed_experts: int,
        num_shared_experts: int,
        ep_size: int,
        num_layers: int,
        num_redundant_experts: int | None = None,
        num_shared_replicas: int | None = None,
    ) -> "ExpertPlacement":
        """Place the experts of `num_layers` layers on `ep_size` ranks.

        By default every EP size can be placed: more ranks than routed experts give the shared expert ranks of its own
        (about one in ten for each expert of its width) and fill the rest with redundant routed experts; otherwise each
        rank runs the shared MLP itself and holds its share of the routed experts, and redundant ones in the slots left
        over: those of an uneven division, or one a rank where it is even.

        Raises:
            UserError: explicit counts that do not fill the ranks evenly, or that cannot hold every expert.
        """
        if ep_size < 1:
            raise UserError(f"ep_size {ep_size} is not positive")
        if num_routed_experts < 1:
            raise UserError(f"num_routed_experts {num_routed_experts} is not positive")
        shared, redundant = _slot_counts(
            num_routed_experts, num_shared_experts, ep_size, num_redundant_experts, num_shared_replicas
        )
        num_slots = num_routed_experts + redundant + shared
        num_local = num_slots // ep_size
        row = _fill_slots(num_routed_experts, num_shared_experts, ep_size, num_local, shared)
        num_logical = num_routed_experts + (num_shared_experts if shared else 0)
        targets = _choose_targets(row, num_logical, ep_size, num_local)
        return cls(
            num_routed_experts=num_routed_experts,
            num_shared_experts=num_shared_experts,
            ep_size=ep_size,
            num_local_experts=num_local,
            num_shared_replicas=shared,
            physical_to_logical=np.repeat(row[None], num_layers, axis=0),
            expert_to_slot=np.repeat(targets[None], num_layers, axis=0),
        )


def _slot_counts(
    num_routed: int, num_shared: int, ep_size: int, redundant: int | None, shared: int | None
) -> tuple[int, int]:
    """Return `(num_shared_replicas, num_redundant_experts)`: what was asked for, the rest by default."""
    if shared is None:
        shared = _default_shared_replicas(num_routed, num_shared, ep_size, redundant)
    if redundant is None:
        used = num_routed + shared
        # Slots left over by uneven division hold replicas; where it is even, each rank gets room for one (on a single
        # rank a second copy would be of no use).
        spare = ep_size if ep_size > 1 and not shared and num_routed % ep_size == 0 else 0
        redundant = -(-used // ep_size) * ep_size + spare - used
    total = num_routed + redundant + shared
    counts = f"{num_routed} routed + {redundant} redundant + {shared} shared replicas"
    if redundant < 0 or shared < 0:
        raise UserError(f"expert counts cannot be negative: {counts}")
    if shared and (num_shared == 0 or shared < num_shared):
        raise UserError(f"num_shared_replicas {shared} cannot hold the model's {num_shared} shared experts: {counts}")
    if total % ep_size:
        raise UserError(
            f"{counts} = {total} experts do not fill {ep_size} ranks evenly: "
            f"num_redundant_experts {redundant + -total % ep_size} would"
        )
    return shared, redundant


def _default_shared_replicas(num_routed: int, num_shared: int, ep_size: int, redundant: int | None) -> int:
    left = ep_size - num_routed - (redundant or 0)
    if num_shared == 0 or left < num_shared:
        return 0
    each = max(1, min(round(ep_size * _SHARED_SLOT_SHARE), left // num_shared))
    return left if redundant is not None else each * num_shared


def _fill_slots(num_routed: int, num_shared: int, ep_size: int, num_local: int, shared: int) -> np.ndarray:
    """Return `int32[slots]`: the logical expert of each slot. Shared replicas come first, then the routed experts in
    order, then redundant copies, spread so that no rank holds two copies of one expert where that can be helped."""
    num_slots = ep_size * num_local
    row = np.full(num_slots, -1, np.int32)
    row[:shared] = num_routed + np.arange(shared) % max(num_shared, 1)
    if num_local == 1 or shared:
        row[shared : shared + num_routed] = np.arange(num_routed)
    else:
        for rank in range(ep_size):
            first, last = rank * num_routed // ep_size, (rank + 1) * num_routed // ep_size
            row[rank * num_local : rank * num_local + last - first] = np.arange(first, last)
    replica_count = np.bincount(row[row >= 0], minlength=num_routed)[:num_routed]
    for slot in map(int, np.flatnonzero(row < 0)):
        rank = slot // num_local
        here = np.isin(np.arange(num_routed), row[rank * num_local : (rank + 1) * num_local])
        # Fewest copies first; among equals start half the instance away, so that copies of one expert lie far apart.
        distance = (np.arange(num_routed) - (slot * num_routed // num_slots + num_routed // 2)) % num_routed
        expert = int(np.lexsort((distance, replica_count, here))[0])
        row[slot] = expert
        replica_count[expert] += 1
    return row


def _choose_targets(row: np.ndarray, num_logical: int, ep_size: int, num_local: int) -> np.ndarray:
    """Return `int32[ep_size, logical]`: a replica on the source rank itself where there is one, else in turn."""
    targets = np.empty((ep_size, num_logical), np.int32)
    ranks = np.arange(ep_size)
    for expert in range(num_logical):
        slots = np.flatnonzero(row == expert)
        owners = slots // num_local
        # Dealt among the others only: in turn over all ranks, owners could leave one replica far fewer than the rest.
        others = np.delete(ranks, owners)
        targets[others, expert] = slots[np.arange(len(others)) % len(slots)]
        targets[owners, expert] = slots
    return targets
