"""The routers inside an instance: host code alone, without steps."""

from hypothesis import given
from hypothesis import strategies as st

from cmjax.serve import SamplingParams
from cmjax.serve.request import Request
from cmjax.serve.router import DecodeRouter, PrefillRouter, choose_rank


def make_request(index: int, length: int, max_tokens: int = 2, **fields) -> Request:
    return Request(f"prompt {index}", [1] * length, SamplingParams(max_tokens=max_tokens), **fields)


def steps_of(router: PrefillRouter, max_tokens: int, max_sequences: int):
    """All steps until the queue is empty; what ends is released at once."""
    while chunks := router.next_step(max_tokens, max_sequences):
        yield chunks
        for request in router.computed(chunks):
            router.release(request)


@given(
    lengths=st.lists(st.integers(1, 60), max_size=20),
    max_tokens=st.integers(1, 50),
    max_sequences=st.integers(1, 8),
    num_blocks=st.integers(15, 40),
)
def test_steps_cover_every_prompt_once_in_order(lengths, max_tokens, max_sequences, num_blocks):
    router = PrefillRouter(num_blocks, 4)
    requests = [make_request(index, length) for index, length in enumerate(lengths)]
    for request in requests:
        router.add(request)
    assert router.load == sum(lengths)
    covered, load = [], router.load
    for chunks in steps_of(router, max_tokens, max_sequences):
        computed = sum(c.stop - c.start for c in chunks)
        assert 0 < computed <= max_tokens
        assert len(chunks) <= max_sequences
        assert len({c.request for c in chunks}) == len(chunks)
        for chunk in chunks:
            assert len(chunk.blocks) == -(-len(chunk.request.prompt_ids) // 4)
            covered += [(requests.index(chunk.request), token) for token in range(chunk.start, chunk.stop)]
        taken = [block for r in requests for block in r.prefill_blocks]
        assert len(set(taken)) == len(taken)
        load -= computed
    assert covered == [(index, token) for index, length in enumerate(lengths) for token in range(length)]
    assert load == router.load == 0
    assert router.pool.num_free == num_blocks


def test_the_example_of_next_step():
    router = PrefillRouter(8, 4)
    first, second = make_request(0, 5), make_request(1, 4)
    router.add(first)
    router.add(second)
    found = [[(c.request, c.start, c.stop) for c in chunks] for chunks in steps_of(router, 6, 8)]
    assert found == [[(first, 0, 5), (second, 0, 1)], [(second, 1, 4)]]


def test_a_prompt_that_is_released_under_way_leaves_nothing():
    router = PrefillRouter(8, 4)
    first, second = make_request(0, 20), make_request(1, 4)
    router.add(first)
    router.add(second)
    chunks = router.next_step(10, 8)
    router.release(first)  # cancelled while the step ran
    assert router.computed(chunks) == []
    assert [c.request for c in router.next_step(10, 8)] == [second]
    router.release(second)
    assert router.pool.num_free == 8
    assert router.queue == []


def test_choose_rank_takes_the_fewest_requests_then_the_most_blocks():
    free = [4, 4, 3, 1]
    assert choose_rank([1, 1, 1, 0], free, 1, 8) == 3
    assert choose_rank([1, 1, 1, 0], free, 2, 8) == 0
    assert choose_rank([2, 1, 1, 0], free, 3, 8) == 1
    assert choose_rank([2, 2, 1, 0], free, 3, 8) == 2
    assert choose_rank([2, 2, 1, 0], free, 5, 8) is None
    assert choose_rank([2, 2, 1, 0], free, 3, 1) is None


def decoding(request: Request, num_tokens: int) -> None:
    request.stage = "decode"
    request.token_ids += [1] * num_tokens


def test_a_request_has_all_its_blocks_where_everybody_can_have_them():
    router = DecodeRouter(1, 2, 2 * 5, 4, 5)
    one, two = make_request(0, 3, 17), make_request(1, 3, 17)
    assert router.reserve(one)
    assert router.reserve(two)
    assert [len(r.decode_blocks) for r in (one, two)] == [5, 5]
    assert router.grow(8) == []


def test_where_blocks_are_scarce_the_least_urgent_makes_room():
    router = DecodeRouter(1, 3, 6, 4, 5)
    requests = [make_request(index, 3, 17, arrival=float(index)) for index in range(3)]
    requests[0].priority = 1  # came first, and is the least urgent
    assert all(router.reserve(request, num_ahead=2) for request in requests)
    assert [len(r.decode_blocks) for r in requests] == [2, 2, 2]
    for request in requests:
        decoding(request, 6)
    assert router.grow(4) == [requests[0]]
    assert [len(r.decode_blocks) for r in requests] == [0, 3, 3]
    assert requests[0].decode_rank == -1
    assert router.running() == requests[1:]


@given(data=st.data())
def test_growth_never_shares_nor_loses_a_block(data):
    """Requests come, grow and go; the blocks of all and the free ones are always the pool; each has what it needs."""
    router = DecodeRouter(2, 3, data.draw(st.integers(8, 20)), 4, 8)
    alive: list[Request] = []
    for index in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["come", "grow", "go"]))
        if action == "come":
            request = make_request(index, data.draw(st.integers(1, 12)), 20, arrival=float(index))
            if router.reserve(request, num_ahead=3):
                decoding(request, 1)
                alive.append(request)
        elif action == "go" and alive:
            router.release(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        elif action == "grow":
            preempted = router.grow(3)
            alive = [r for r in alive if r not in preempted]
            for request in alive:
                assert len(request.decode_blocks) * 4 >= min(request.num_tokens, request.num_cached + 3)
                request.token_ids += [1] * min(3, 20 - len(request.token_ids))
        for rank, pool in enumerate(router.pools):
            held = [block for r in alive if r.decode_rank == rank for block in r.decode_blocks]
            assert len(set(held)) == len(held)
            assert len(held) + pool.num_free == pool.num_blocks
        assert router.num_requests == len(alive)
        assert sorted(map(id, router.placed())) == sorted(map(id, alive))
