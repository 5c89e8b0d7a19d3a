"""The KV hand-off: the right latents, bit for bit, in the right slots, from the right rank, on the right books."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import fabric
from cmjax.serve import hand_off, prefill_tp_rank
from cmjax.serve.block_pool import slot_mapping
from tests.helpers import max_error, tiny_model
from tests.serve.driving import make_engine, make_requests, prefill_by_step, reserve

LENGTHS = (17, 1, 30, 16, 5, 33, 9, 2, 12, 20)


def copied(cache_of_rank, blocks, length, block_size):
    """The latents `[layers, length, width]` of a request in a rank's cache."""
    return cache_of_rank[:, slot_mapping(blocks, np.arange(length), block_size)]


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
        # Freed blocks come back out of order, so that block tables are no ranges.
        source, self.target = self.engine.prefill[0], self.engine.decode
        source.num_blocks, self.target.num_blocks = 64, 64
        source.reset()
        self.target.reset()
        for pool in (source.router.pool, *self.target.router.pools):
            blocks = pool.take(10)
            pool.free(blocks[::-1])
            pool.take(3)
        prompts = [np.random.default_rng(i).integers(0, 101, length).tolist() for i, length in enumerate(lengths)]
        self.requests = make_requests(prompts, 4)
        reserve(self.target, self.requests)
        self.sent, self.hidden = {}, {}
        fabric.books.reset()
        for ended, _ in prefill_by_step(source, self.requests):
            cache = np.asarray(source.cache)
            for one in ended:
                length = len(one.request.prompt_ids)
                self.sent[one.request.request_id] = np.stack([copied(c, one.blocks, length, 8) for c in cache])
                self.hidden[one.request.request_id] = np.asarray(one.last_hidden[one.row])
            hand_off(source, self.target, ended)
        self.matrix = fabric.books.snapshot().matrix("rdma", "kv_handoff")
        self.cache = np.asarray(self.target.cache)

    def arrived(self, request):
        """The latents of a request in its decode rank's cache."""
        return copied(self.cache[request.decode_rank], request.decode_blocks, len(request.prompt_ids), 8)


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
        np.testing.assert_array_equal(found[request.decode_rank, request.decode_place], expected)
    taken = {(r.decode_rank, r.decode_place) for r in transfer.requests}
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
def test_bytes_are_booked_from_the_mapped_rank_to_the_decode_rank(transfer, ep_size, prefill_ep_size, dtype):
    if ep_size != 8:
        transfer = Transfer(ep_size, prefill_ep_size, dtype)
    config, itemsize = transfer.model.config, np.dtype(dtype).itemsize
    expected = np.zeros_like(transfer.matrix)
    for request in transfer.requests:
        peer = prefill_tp_rank(request.decode_rank, prefill_ep_size, ep_size)
        values = config.num_cache_layers * len(request.prompt_ids) * config.latent_width + config.hidden_size
        expected[peer, prefill_ep_size + request.decode_rank] += values * itemsize
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
