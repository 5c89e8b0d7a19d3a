"""`cmjax bench cache`: traces with hashes, the prompts made of them, what is asked of the figures, and small runs."""

import dataclasses
import json

import numpy as np
import pytest

from cmjax.bench import cache_agents, cache_reuse, cache_trace
from cmjax.bench.cache_agents import AgentSettings, Turn
from cmjax.bench.cache_reuse import VARIANTS, ReuseSettings, Sample, vpc_delay
from cmjax.bench.cache_trace import HashedRequest, TraceCacheSettings, make_prompt, read_hashed_trace, scaled_lookups
from cmjax.cli import main
from cmjax.errors import UserError
from cmjax.serve.caching import CacheSettings
from tests.helpers import tiny_model

LINE = {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}


def write_trace(path, *lines):
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
    return path


# -- traces with hashes -----------------------------------------------------------------------------------------------


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path):
    earlier = LINE | {"timestamp": 1, "input_length": 600, "hash_ids": [7]}  # the rest has no hash
    file = write_trace(tmp_path / "trace.jsonl", LINE, "", earlier)
    assert read_hashed_trace(file, 512) == [HashedRequest(0.001, 600, (7,)), HashedRequest(2.0, 1100, (7, 8, 9))]
    assert len(read_hashed_trace(file, 512, most=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no request with hashes"),
        ("[1]", "it is no object"),
        ({"timestamp": 0, "input_length": 3}, "there is no 'hash_ids'"),
        (LINE | {"timestamp": "soon"}, "timestamp 'soon' is no time"),
        (LINE | {"timestamp": float("nan")}, "is no time"),
        (LINE | {"input_length": 0}, "input_length 0 is no number of tokens"),
        (LINE | {"input_length": 5.5}, "input_length 5.5 is no number of tokens"),
        (LINE | {"hash_ids": [1, -2]}, "hash_ids are no list of numbers"),
        (LINE | {"hash_ids": "abc"}, "hash_ids are no list of numbers"),
        (
            LINE | {"hash_ids": [1, 2, 3, 4]},
            "4 hash_ids are more than 1100 tokens have blocks of 512: see --hash-tokens",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line, message):
    file = write_trace(tmp_path / "trace.jsonl", LINE, line)
    with pytest.raises(UserError) as caught:
        read_hashed_trace(file, 512)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_trace_is_one_line(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_hashed_trace(tmp_path / "none.jsonl", 512)
    with pytest.raises(UserError, match="Is a directory"):
        read_hashed_trace(tmp_path, 512)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't decode"):
        read_hashed_trace(tmp_path / "bytes", 512)
    with pytest.raises(UserError, match="no requests"):
        read_hashed_trace(write_trace(tmp_path / "empty.jsonl"), 512)


def test_prompts_share_what_the_hashes_share_and_nothing_else():
    settings = TraceCacheSettings(scale=64)
    requests = [
        HashedRequest(0, 1100, (7, 8, 9)),
        HashedRequest(0, 1500, (7, 8, 10)),
        HashedRequest(0, 1500, (7, 8)),
        HashedRequest(0, 1500, (7, 8)),
        HashedRequest(0, 1536, (5, 8, 9)),
    ]
    first, second, third, again, other = (make_prompt(one, index, settings, 4096) for index, one in enumerate(requests))
    assert [len(one) for one in (first, second, third, again, other)] == [18, 24, 24, 24, 24]
    assert first[:16] == second[:16] == third[:16] == again[:16]
    assert other[8:18] == first[8:]  # the last block is not whole, and still what its hash stands for
    assert len({tuple(one[16:18]) for one in (first, second, third, again)}) == 4
    assert first == make_prompt(requests[0], 3, settings, 4096)
    lookups = scaled_lookups(requests, settings)
    assert [one.num_usable for one in lookups] == [2, 2, 2, 2, 2]
    assert [len(one.keys) for one in lookups] == [2, 3, 2, 2, 3]


def test_as_many_blocks_as_before_scaling():
    settings = TraceCacheSettings(scale=64)
    for length in (1, 511, 512, 513, 1024, 5000):
        prompt = make_prompt(HashedRequest(0, length, tuple(range(-(-length // 512)))), 0, settings, 100)
        assert -(-len(prompt) // settings.block_tokens) == -(-length // 512)


# -- what is asked of the figures -------------------------------------------------------------------------------------


def reuse_samples(settings, shared, *, own_at_pool=0):
    """Made up: a token takes a millisecond where it is computed, and a tenth of it where it comes from the pool."""
    samples = {}
    for index in range(settings.rounds):
        for reuse in settings.each_reuse:
            for variant in VARIANTS:
                for is_burst in (False, True):
                    count = settings.burst if is_burst else 1
                    found = 0 if variant == "off" else shared[reuse] * count
                    total = settings.prompt_len * count
                    price = {"off": 0.0, "own": 0.0, "pool": 1e-4, "vpc": 5e-4}[variant]
                    seconds = (1 + index) * ((total - found) * 1e-3 + found * price)
                    own = found if variant == "own" else own_at_pool
                    stored_s = 0.02 * total * 1e-3 * (1 + index) * (variant != "off")
                    samples[index, reuse, variant, is_burst] = Sample(
                        seconds / count, seconds, stored_s, total, own, found - own
                    )
    return samples


def test_the_summary_of_reuse():
    settings, shared = ReuseSettings(reuse="0,90", prompt_len=1000, rounds=3), {0.0: 0, 90.0: 900}
    report = cache_reuse.summarize(settings, reuse_samples(settings, shared), shared)
    summary = report["summary"]
    assert report["as_meant"]
    for name in ("ttft", "throughput"):
        assert summary["speedup"][name] == pytest.approx(1.0 / 0.19)
        assert summary["share_of_own"][name] == pytest.approx(0.1 / 0.19)
    assert summary["cost"] == {"ttft": pytest.approx(0), "throughput": pytest.approx(0.02)}
    rows = {(row["reuse"], row["variant"]): row for row in report["results"]}
    assert rows[90.0, "pool"]["found_pool"] == pytest.approx(0.9)
    assert rows[90.0, "own"]["found_own"] == pytest.approx(0.9)
    assert rows[90.0, "off"]["ttft_ratio"] == [1.0, 1.0, 1.0]
    assert rows[0.0, "off"]["ttft_s"] == pytest.approx(2.0)  # the median round


def test_what_is_found_elsewhere_is_told():
    settings, shared = ReuseSettings(reuse="0,90", prompt_len=1000, rounds=1), {0.0: 0, 90.0: 900}
    assert not cache_reuse.summarize(settings, reuse_samples(settings, shared, own_at_pool=16), shared)["as_meant"]
    for variant in ("pool", "vpc", "own"):
        samples = reuse_samples(settings, shared)
        some = samples[0, 90.0, variant, False]
        samples[0, 90.0, variant, False] = dataclasses.replace(some, num_pool=some.num_pool - 128)
        assert not cache_reuse.summarize(settings, samples, shared)["as_meant"]


def test_a_transfer_takes_as_much_of_a_prefill_as_in_the_paper():
    """90 % of a prompt from the VPC plane: 0.166 of 2.45 s there, of any other model and machine the same share."""
    for prefill_s, token_bytes in ((2.45, 70_272), (7.0, 1_920)):
        delay = vpc_delay(prefill_s * 6688 / 16384, token_bytes)
        seconds = delay.multiplier * 0.9 * 16384 * token_bytes / delay.bytes_per_s["vpc"]
        assert seconds / prefill_s == pytest.approx(0.9 * 16384 * 70_272 / (50e9 / 8) / (16384 / 6688), rel=1e-3)


def test_what_agents_could_have_found():
    """Blocks of four: eight tokens in common, two a message, three an answer of which the last is not computed yet."""
    settings = AgentSettings(users=2, turns=2, prefix_len=8, message_len=2, answer_len=3)
    common, turns = list(range(8)), {}
    for user in range(2):
        first = [*common, 10 + user, 20 + user]
        answer = [30 + user, 40 + user, 50 + user]
        second = [*first, *answer, 60 + user, 70 + user]
        for name in ("off", "on"):
            speed = 2 if name == "on" else 1
            turns[0, user, name] = Turn(first, answer, 1.0 / speed, 8 * (user == 1 and name == "on"), 0)
            turns[1, user, name] = Turn(second, answer, 2.0 / speed, 8 * (name == "on"), 4)
    first, second = cache_agents.summarize(settings, turns, 4)
    assert first["possible"] == first["possible_with_answers"] == 8 / 20
    assert second["possible"] == 16 / 30
    assert second["possible_with_answers"] == 24 / 30
    assert (first["hit_rate"], second["hit_rate"]) == (8 / 20, 16 / 30)
    assert (second["in_place"], second["ttft_ratio"], second["ttft_off_s"]) == (0.5, 2.0, 2.0)


# -- small runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("reuse", "--reuse", "50,100"), "--reuse '50,100': give percentages below 100"),
        (("reuse", "--reuse", "x"), "give percentages"),
        (("trace", "--trace", "none.jsonl"), "none.jsonl: No such file or directory"),
        (("trace", "--trace", "x", "--scale", "100"), "--scale 100 does not divide the 512 tokens of a hash"),
        (("trace", "--trace", "x", "--cache-blocks", "5,0"), "--cache-blocks '5,0': give positive numbers"),
    ],
)
def test_mistakes_are_one_line(capsys, options, message):
    assert main(["bench", "cache", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_reuse_on_a_tiny_model(tmp_path):
    """Every sample finds its beginning where its variant has it, also with a single share."""
    settings = ReuseSettings(reuse="75", prompt_len=64, burst=1, rounds=2)
    report = cache_reuse.run(settings, tiny_model(num_hidden_layers=2), cache_block=16)
    assert report["as_meant"]
    found = {row["variant"]: (row["found_own"], row["found_pool"]) for row in report["results"]}
    assert found == {"off": (0, 0), "pool": (0, 0.75), "own": (0.75, 0), "vpc": (0, 0.75)}
    assert json.loads(json.dumps(report)) == report
    assert [len(one.rows) for one in cache_reuse.tables(report)] == [4, 0]
    cache_reuse.plot(report, str(tmp_path / "reuse.png"))
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_on_a_tiny_model(tmp_path):
    """The engine delivers what the hashes predict, and a cache of the size could do better."""
    rng = np.random.default_rng(0)
    families = [[(family, place) for place in range(6)] for family in range(20)]
    lines = []
    for index, family in enumerate(rng.integers(0, 20, 150).tolist()):
        kept = families[family][: int(rng.integers(1, 6))]
        hashes = [10 * one + place for one, place in kept] + [1000 + index]
        length = 512 * len(hashes) - int(rng.integers(0, 512))
        lines.append({"timestamp": index, "input_length": length, "output_length": 1, "hash_ids": hashes})
    file = write_trace(tmp_path / "trace.jsonl", *lines)
    settings = TraceCacheSettings(scale=64, cache_blocks="66,84")
    report = cache_trace.run(file, settings, tiny_model(num_hidden_layers=2))
    assert [row["pool_blocks"] for row in report["results"]] == [64, 82]  # a block's tokens are stored with it
    for row in report["results"]:
        assert row["num_evicted"] > 0
        assert row["predicted"] < row["clairvoyant"], row
    assert report["largest_difference"] <= report["bounds"]["largest_difference"], report["results"]
    assert json.loads(json.dumps(report)) == report
    assert [len(one.rows) for one in cache_trace.tables(report)] == [2]
    cache_trace.plot(report, str(tmp_path / "trace.png"))
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_agents_on_a_tiny_model(tmp_path):
    settings = AgentSettings(users=2, turns=3, prefix_len=24, message_len=5, answer_len=7)
    cache = CacheSettings(cache_block_size=16, decode_blocks="always", fetch="always")
    report = cache_agents.run(settings, tiny_model(num_hidden_layers=2), cache=cache)
    rows = report["results"]
    assert [row["prompt_tokens"] for row in rows] == [29, 41, 53]
    for row in rows:
        assert row["possible"] <= row["hit_rate"] <= row["possible_with_answers"]
    assert rows[0]["hit_rate"] == 16 / 58  # the second agent finds what the first one has in common with it
    assert json.loads(json.dumps(report)) == report
    assert [len(one.rows) for one in cache_agents.tables(report)] == [3]
    cache_agents.plot(report, str(tmp_path / "agents.png"))
    assert (tmp_path / "agents.png").read_bytes().startswith(b"\x89PNG")
