"""The fabric's core without XLA: calls that XLA makes only when it likes, and what is left in buffers it would hide."""

import pathlib
import subprocess

import numpy as np
import pytest

from cmjax.mesh.native import build
from cmjax.native import find_compiler

RANKS, UPDATES, ROWS_IN, ROWS_OUT, MARGIN = 8, 3, 40, 48, 5


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Runs fabric_alone.cc: `core("twice")` is the lines it prints."""
    native = pathlib.Path(build.__file__).parent
    program = tmp_path_factory.mktemp("core") / "fabric_alone"
    sources = [pathlib.Path(__file__).with_name("fabric_alone.cc"), native / "fabric.cc", native / "exchange.cc"]
    # The library's checks make an index outside a vector end the program instead of reading what is there.
    checks = ["-D_GLIBCXX_ASSERTIONS", "-D_LIBCPP_HARDENING_MODE=_LIBCPP_HARDENING_MODE_FAST"]
    flags = ["-std=c++17", "-pthread", f"-I{native}", *checks]
    subprocess.run([find_compiler(), *flags, *sources, "-o", program], check=True)

    def run(what, numbers=()):
        given = " ".join(map(str, numbers))
        result = subprocess.run([program, what], input=given, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_entering_twice_names_the_channel(core):
    message = (
        "fabric.psum on channel 'shared' (group 0, 2 ranks): rank 0 entered again before its last exchange was "
        "complete; two calls without data dependence need distinct channel="
    )
    assert core("twice") == [message] * 3


def test_a_ticket_of_fewer_ranks_is_refused(core):
    message = (
        "fabric.psum on channel 'shared' (group 0, 2 ranks): rank 5 finished what it had not started: "
        "it is one of 8 ranks of group 0"
    )
    assert core("foreign-ticket") == [message] * 2


def one_row_each():
    """Index arrays [sender, receiver, update], recv_sizes [receiver, sender, update]: every update carries a row."""
    sizes = np.ones((RANKS, RANKS, UPDATES), int)
    input_offsets = np.broadcast_to(np.arange(RANKS * UPDATES).reshape(RANKS, UPDATES), sizes.shape)
    return [input_offsets.copy(), sizes, input_offsets.transpose(1, 0, 2).copy(), sizes.copy()]


def exchange(core, cases):
    """What every exchange of `cases`, (bytes of an index, index arrays), gave: per rank, its error and its output.

    An output stands between rows of memory that are nobody's. The last line is how many exchanges were counted.
    """
    numbers = []
    for index_bytes, index in cases:
        numbers += [index_bytes, RANKS, UPDATES, ROWS_IN, ROWS_OUT, MARGIN, *np.concatenate([*map(np.ravel, index)])]
    *lines, calls = core("ragged", numbers)
    results = []
    for i in range(0, len(lines), RANKS + 1):
        memory = np.array(lines[i + RANKS].split(), int).reshape(RANKS, ROWS_OUT + 2 * MARGIN)
        results.append((lines[i : i + RANKS], memory))
    assert len(results) == len(cases)
    return results, int(calls)


def untouched():
    return -1 - np.arange(RANKS * (ROWS_OUT + 2 * MARGIN)).reshape(RANKS, -1)


def expected_memory(index):
    operand, memory = 1 + np.arange(RANKS * ROWS_IN).reshape(RANKS, ROWS_IN), untouched()
    for s, d, j in np.ndindex(RANKS, RANKS, UPDATES):
        start, size, target = (array[s, d, j] for array in index[:3])
        memory[d, MARGIN + target :][:size] = operand[s, start:][:size]
    return memory


def test_a_failed_exchange_leaves_every_output_as_it_was(core):
    """One wrong number among several pieces for each rank, in the first place, in the last and in between."""
    wrong = [(0, ROWS_IN), (0, -1), (1, 2), (1, -1), (2, ROWS_OUT), (2, -1), (2, 2**31 - 1), (3, 0), (3, 5)]
    places = [(0, 0, 0), (0, 0, UPDATES - 1), (2, 6, 1), (6, 2, 1), (7, 0, 2), (0, 7, 2), (RANKS - 1, RANKS - 1, 2)]
    cases = [(4, one_row_each()), (8, one_row_each())]
    for array, value in wrong:
        for sender, receiver, update in places:
            index = one_row_each()
            rank, peer = (receiver, sender) if array == 3 else (sender, receiver)
            index[array][rank, peer, update] = value
            cases.append((8 if value == -1 else 4, index))
    results, calls = exchange(core, cases)
    for errors, memory in results[:2]:
        assert errors == [""] * RANKS
        np.testing.assert_array_equal(memory, expected_memory(one_row_each()))
    for errors, memory in results[2:]:
        assert errors[0].startswith("fabric.ragged_all_to_all on channel 'shared' (group 0, 8 ranks): ")
        assert errors == errors[:1] * RANKS
        np.testing.assert_array_equal(memory, untouched())
    assert calls == 2  # what did not move is not counted


@pytest.mark.parametrize("index_bytes", [4, 8])
def test_pieces_that_overlap_stay_inside_the_output(core, index_bytes):
    """Several updates of one sender, and several senders, write the same rows: each row is one that was sent there."""
    index = one_row_each()
    index[1][:], index[3][:] = 4, 4
    index[0][:] = np.arange(UPDATES) * 4
    index[2][:] = np.arange(RANKS)[:, None, None] // 2 + np.arange(UPDATES)
    index[2][:, 3] = ROWS_OUT - 4  # all of them on the last rows of rank 3
    ((errors, memory),), _ = exchange(core, [(index_bytes, index)])
    assert errors == [""] * RANKS
    sent = {}
    for s, d, j, row in np.ndindex(RANKS, RANKS, UPDATES, 4):
        values = sent.setdefault((d, MARGIN + index[2][s, d, j] + row), set())
        values.add(1 + s * ROWS_IN + index[0][s, d, j] + row)
    expected = untouched()
    for place, values in sent.items():
        assert memory[place] in values
        expected[place] = memory[place]
    np.testing.assert_array_equal(memory, expected)
