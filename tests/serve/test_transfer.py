"""The KV hand-off: the right latents, bit for bit, in the right slots, from the right rank, counted as they travel."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import fabric
from cmjax.schedule import BlockPool, slot_mapping
from cmjax.serve import prefill_tp_rank
from tests.helpers import max_error, tiny_model
from tests.serve.driving import Drive, make_engine, make_requests

LENGTHS = (17, 1, 30, 16, 5, 33, 9, 2, 12, 20)


def copied(cache_of_rank, blocks, length, block_size):
    """The latents `[layers, length, width]` of a request in a rank's cache."""
    return cache_of_rank[:, slot_mapping(blocks, np.arange(length), block_size)]


def scattered(init):
    """Pools whose blocks come out of order, so that block tables are no ranges."""

    def start(self, *args):
        init(self, *args)
        if self.num_blocks >= 10:
            first = self.take(10)
            for block in first.ids[::-1]:
                self.free([block])

    return start


class Transfer:
    """Prompts prefilled in steps, each step handed over at once; what both sides hold, as host arrays."""

    def __init__(self, ep_size, prefill_ep_size, dtype=np.float32, lengths=LENGTHS, places=2):
        self.model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=2, dtype=dtype)
        self.engine = make_engine(
            self.model,
            ep_size,
            prefill_ep_size=prefill_ep_size,
            max_model_len=64,
            block_size=8,
            max_num_batched_tokens=32,
            max_num_seqs_per_rank=places,
        )
        self.target = self.engine.decode
        prompts = [np.random.default_rng(i).integers(0, 101, length).tolist() for i, length in enumerate(lengths)]
        self.requests = make_requests(self.model, prompts, 4)
        self.sent, self.hidden = {}, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BlockPool, "__init__", scattered(BlockPool.__init__))
            drive = Drive(self.engine, self.requests)
        fabric.traffic.reset()
        plan = drive.prefill(on_end=lambda plan: self.note(drive, plan))
        self.matrix = fabric.traffic.snapshot().matrix("rdma", "kv_handoff")
        self.cache = np.asarray(self.target.cache)
        attempts = [drive.decode_planner.attempts[attempt_id] for attempt_id in plan.attempt_ids.tolist()]
        self.holds = {attempt.request.request_id: attempt.decode for attempt in attempts}

    def note(self, drive, plan):
        """What the source holds of the prompts that a step has ended."""
        cache, hidden = np.asarray(drive.source.cache), np.asarray(drive.source.last_hidden(plan.number))
        for row in np.flatnonzero(plan.is_last).tolist():
            attempt = drive.planner.attempts[int(plan.attempt_ids[row])]
            name, blocks = attempt.request.request_id, attempt.prefill.blocks.ids
            self.sent[name] = np.stack([copied(c, blocks, attempt.num_prefill, 8) for c in cache])
            self.hidden[name] = hidden[row]

    def arrived(self, request):
        """The latents of a request in its decode rank's cache."""
        hold = self.holds[request.request_id]
        return copied(self.cache[hold.rank], hold.blocks.ids, len(request.prompt_ids), 8)

    def place(self, request):
        """(rank, place) of a request."""
        hold = self.holds[request.request_id]
        return hold.rank, hold.place.ids[0]


@pytest.fixture(scope="module")
def transfer():
    return Transfer(8, 4)


def test_every_prefill_rank_holds_the_same_latents(transfer):
    num_layers = transfer.model.config.num_hidden_layers
    for request in transfer.requests:
        first, *others = transfer.sent[request.request_id]
        for other in others:
            np.testing.assert_array_equal(other[:num_layers], first[:num_layers])
            # The MTP layer has no row for the last token, whose successor was not known yet.
            np.testing.assert_array_equal(other[num_layers:, :-1], first[num_layers:, :-1])


def test_the_latents_arrive_bit_for_bit(transfer):
    for request in transfer.requests:
        arrived, sent = transfer.arrived(request), transfer.sent[request.request_id][0]
        assert arrived.shape == sent.shape == (3, len(request.prompt_ids), transfer.model.config.latent_width)
        np.testing.assert_array_equal(arrived[:-1], sent[:-1])
        np.testing.assert_array_equal(arrived[-1, :-1], sent[-1, :-1])


def test_last_hidden_states_arrive_in_their_places(transfer):
    found = np.asarray(transfer.target.hidden).reshape(8, 2, -1)
    for request in transfer.requests:
        expected = transfer.hidden[request.request_id]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_array_equal(found[transfer.place(request)], expected)
    taken = {transfer.place(request) for request in transfer.requests}
    free = [(rank, place) for rank in range(8) for place in range(2) if (rank, place) not in taken]
    assert free
    for rank, place in free:
        np.testing.assert_array_equal(found[rank, place], 0)


def test_one_device_computes_the_same_latents(transfer):
    alone = Transfer(1, 1, places=len(LENGTHS))
    for one, many in zip(alone.requests, transfer.requests, strict=True):
        expected, found = alone.arrived(one), transfer.arrived(many)
        assert max_error(found[:-1], expected[:-1]) < 1e-5
        if len(one.prompt_ids) > 1:
            assert max_error(found[-1, :-1], expected[-1, :-1]) < 1e-5
        assert max_error(transfer.hidden[many.request_id], alone.hidden[one.request_id]) < 1e-5


@pytest.mark.parametrize(("ep_size", "prefill_ep_size", "dtype"), [(8, 4, np.float32), (12, 5, jnp.bfloat16)])
def test_bytes_are_counted_from_the_mapped_rank_to_the_decode_rank(transfer, ep_size, prefill_ep_size, dtype):
    if ep_size != 8:
        transfer = Transfer(ep_size, prefill_ep_size, dtype)
    config, itemsize = transfer.model.config, np.dtype(dtype).itemsize
    expected = np.zeros_like(transfer.matrix)
    for request in transfer.requests:
        rank, _ = transfer.place(request)
        peer = prefill_tp_rank(rank, prefill_ep_size, ep_size)
        values = config.num_cache_layers * len(request.prompt_ids) * config.latent_width + config.hidden_size
        expected[peer, prefill_ep_size + rank] += values * itemsize
    np.testing.assert_array_equal(transfer.matrix, expected)


def test_the_paper_s_mapping():
    """Section 4.3.3: prefill TP 32, decode DP 320 and TP 1. Each prefill rank feeds ten decode ranks, side by side."""
    for rank in range(320):
        ratio = 32 / 1
        group_size = 320 / ratio
        assert prefill_tp_rank(rank, 32, 320) == int(rank // group_size) * 1 + 0
    np.testing.assert_array_equal(np.bincount([prefill_tp_rank(r, 32, 320) for r in range(320)]), 10)


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(4, 8), (5, 12), (7, 3), (32, 300), (1, 1), (320, 320)])
def test_other_sizes_are_spread_evenly_in_order(prefill_size, decode_size):
    peers = [prefill_tp_rank(rank, prefill_size, decode_size) for rank in range(decode_size)]
    assert peers == sorted(peers)
    assert set(peers) <= set(range(prefill_size))
    fed = np.bincount(peers, minlength=prefill_size)
    assert fed.max() - fed.min() <= 1
