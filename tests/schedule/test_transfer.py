"""Hand-offs: what travels in which round, and what each side is told of it."""

import collections
import itertools
import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import BlockPool, Part, Transfer, make_segments, plan_rounds
from cmjax.schedule.request import DecodeHold, PrefillHold
from cmjax.schedule.transfer import empty_receive
from tests.schedule.clusters import BLOCK, attempt_at, make_request, make_transfer

PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=12)


def by_rank(parts):
    groups = collections.defaultdict(list)
    for part in parts:
        groups[part.rank].append(part)
    return groups


@given(prompts=PROMPTS, max_tokens=st.integers(1, 25))
def test_every_token_travels_once_in_order_and_few_at_a_time(prompts, max_tokens):
    ranks, lengths = [rank for rank, _ in prompts], [length for _, length in prompts]
    rounds = plan_rounds(ranks, lengths, max_tokens)
    seen = collections.defaultdict(list)
    for number, parts in enumerate(rounds):
        assert parts == sorted(parts, key=lambda part: (part.rank, part.begin))
        for rank, some in by_rank(parts).items():
            filled = 0
            for part in some:
                assert part.start < part.stop
                assert ranks[part.prompt] == rank
                assert part.begin == filled  # side by side, in the order of the prompts
                filled += part.stop - part.start
                seen[part.prompt] += range(part.start, part.stop)
            assert filled <= max_tokens
            # A rank's rounds are full but its last.
            total = sum(length for one, length in prompts if one == rank)
            assert filled == max_tokens or number == (total - 1) // max_tokens
            ending = [part for part in some if part.stop == lengths[part.prompt]]
            assert [part.hidden_row for part in ending] == list(range(len(ending)))
            assert all(part.hidden_row == -1 for part in some if part not in ending)
    assert dict(seen) == {index: list(range(length)) for index, length in enumerate(lengths)}
    most = max(by_rank(Part(0, rank, 0, 0, length, 0) for rank, length in prompts).values(), default=[], key=tokens_of)
    assert len(rounds) == -(-tokens_of(most) // max_tokens)


def tokens_of(parts):
    return sum(part.stop - part.start for part in parts)


def test_the_example_of_the_rounds():
    rounds = plan_rounds([3, 3], [5, 2], 4)
    assert rounds == [[Part(0, 3, 0, 0, 4, -1)], [Part(0, 3, 0, 4, 5, 0), Part(1, 3, 1, 0, 2, 1)]]


def test_the_blocks_of_a_segment_are_those_of_its_tokens():
    parts = [Part(0, 1, 0, 3, 9, -1), Part(1, 2, 0, 0, 4, 0), Part(1, 2, 4, 8, 9, 1)]
    segments = make_segments(parts, lambda part: [10 * part.prompt + block for block in range(5)], 4)
    assert [blocks.tolist() for blocks in segments.blocks] == [[0, 1, 2], [10], [12]]
    assert segments.ranks.tolist() == [1, 2, 2]
    assert segments.begins.tolist() == [0, 0, 4]
    assert segments.starts.tolist() == [3, 0, 8]
    assert segments.stops.tolist() == [9, 4, 9]
    assert segments.hidden_rows.tolist() == [-1, 0, 1]
    assert all(column.dtype == np.int32 for column in (segments.ranks, segments.begins, segments.blocks.values))


def travelling(prompts, max_tokens, step=4) -> Transfer:
    """A hand-off of prompts `(rank, length)`, with blocks in odd orders on both sides."""
    source, source_places = BlockPool(400), BlockPool(100)
    pools = [(BlockPool(400), BlockPool(100)) for _ in range(4)]
    for pool in (source, *(blocks for blocks, _ in pools)):
        odd = [pool.take(7), pool.take(5)]
        odd[1].give_back()
    attempts = []
    for index, (rank, length) in enumerate(prompts):
        attempt = attempt_at(make_request(index, [1] * length, 4))
        attempt.prefill = PrefillHold(source_places.take(1), source.take(-(-length // BLOCK)))
        blocks, places = pools[rank]
        attempt.decode = DecodeHold(rank, places.take(1), blocks.take(-(-(length + 3) // BLOCK)))
        attempts.append(attempt)
    return make_transfer(attempts, max_tokens, step)


@given(prompts=PROMPTS.filter(bool), max_tokens=st.integers(1, 25), over=st.sets(st.integers(0, 11)), data=st.data())
def test_both_sides_name_the_same_tokens_in_their_own_blocks(prompts, max_tokens, over, data):
    """What the target writes has been sent, at the same place of the round, whoever is over before or meanwhile."""
    transfer = travelling(prompts, max_tokens)
    over = [index for index in sorted(over) if index < len(prompts)]
    early = over[: data.draw(st.integers(0, len(over)))]
    for index in early:
        del transfer.missing[transfer.attempts[index].id]
    sent = {}
    while (plan := transfer.next_send(BLOCK)) is not None:
        plan = pickle.loads(pickle.dumps(plan))
        assert (plan.transfer_id, plan.target, plan.step) == (transfer.id, "decode0", 4)
        sent[plan.round] = plan
    for index in over[len(early) :]:
        del transfer.missing[transfer.attempts[index].id]
    number_of = {attempt.id: index for index, attempt in enumerate(transfer.attempts)}
    written = collections.defaultdict(list)
    for number, plan in data.draw(st.permutations(sorted(sent.items()))):
        received = transfer.receive(number, BLOCK)
        assert (received.transfer_id, received.round) == (transfer.id, number)
        rows = {(rank, begin): row for row, (rank, begin) in enumerate(places_of(plan.segments))}
        for row, place in enumerate(places_of(received.segments)):
            at = rows[place]
            index = number_of[received.attempt_ids[row]]
            attempt = transfer.attempts[index]
            assert plan.attempt_ids[at] == attempt.id
            span = (received.segments.starts[row], received.segments.stops[row])
            assert span == (plan.segments.starts[at], plan.segments.stops[at])
            for segments, which, lease in (
                (plan.segments, at, attempt.prefill.blocks),
                (received.segments, row, attempt.decode.blocks),
            ):
                assert list(segments.blocks)[which].tolist() == lease.ids[span[0] // BLOCK : -(-span[1] // BLOCK)]
            has_end = span[1] == prompts[index][1]
            assert plan.step_rows[at] == (index if has_end else -1)
            assert received.places[row] == (attempt.decode.place.ids[0] if has_end else -1)
            assert received.segments.hidden_rows[row] == plan.segments.hidden_rows[at]
            assert (received.segments.hidden_rows[row] >= 0) == has_end
            written[index] += range(*span)
    alive = [index for index in range(len(prompts)) if index not in over]
    assert {index: sorted(tokens) for index, tokens in written.items()} == {
        index: list(range(prompts[index][1])) for index in alive
    }


def places_of(segments):
    return zip(segments.ranks.tolist(), segments.begins.tolist(), strict=True)


def test_rounds_that_nobody_waits_for_are_not_sent():
    transfer = travelling([(0, 8), (0, 4), (1, 3)], 4)
    assert len(transfer.rounds) == 3
    first, second, third = transfer.attempts
    assert transfer.next_send(BLOCK).attempt_ids.tolist() == [first.id, third.id]
    del transfer.missing[first.id]
    plan = transfer.next_send(BLOCK)
    assert (plan.round, plan.attempt_ids.tolist()) == (2, [second.id])
    assert transfer.next_send(BLOCK) is None
    late = transfer.receive(1, BLOCK)  # the round was under way when the first one ended
    assert len(late.attempt_ids) == len(late.segments.ranks) == len(late.places) == 0
    for attempt in (second, third):
        del transfer.missing[attempt.id]
    assert transfer.next_send(BLOCK) is None


def test_a_round_of_a_hand_off_that_is_over_is_thrown_away():
    plan = pickle.loads(pickle.dumps(empty_receive(5, 2)))
    assert (plan.transfer_id, plan.round) == (5, 2)
    arrays = [plan.attempt_ids, plan.places, plan.segments.ranks, plan.segments.stops, *plan.segments.blocks]
    assert all(len(array) == 0 for array in arrays)


def test_rounds_may_arrive_in_any_order():
    """And one that is missing keeps its prompts waiting, not those whose tokens are all there."""
    for order in itertools.permutations(range(3)):
        transfer = travelling([(0, 10), (1, 4)], 4)
        whole, short = transfer.attempts
        left = dict(transfer.missing)
        for number in order:
            plan = transfer.receive(number, BLOCK)
            for attempt_id, start, stop in zip(
                plan.attempt_ids.tolist(), plan.segments.starts, plan.segments.stops, strict=True
            ):
                left[attempt_id] -= stop - start
            assert (left[short.id] == 0) == (number == 0 or 0 in order[: order.index(number)])
        assert left == {whole.id: 0, short.id: 0}
