"""The Prometheus text: hand-made handles and statistics in, names and values as vLLM's users know them out."""

import dataclasses
import math
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from cmjax.schedule import CacheStats, EngineStats, InstanceStats, RequestTimes
from cmjax.serve.caching import Counters, NodeStats, PoolStats
from cmjax.serve.http.metrics import Metrics

LABELS = {"model_name": "demo", "engine": "0"}
STATS = EngineStats(
    instances=[
        InstanceStats("prefill0", "prefill", "ready", 2, 3, 1, 40, 10, 7, 900, 1.5),
        InstanceStats(
            "decode0",
            "decode",
            "ready",
            4,
            5,
            0,
            80,
            20,
            60,
            300,
            2.5,
            num_places=8,
            seqs_per_rank=2,
            expert_imbalance=1.5,
        ),
    ],
    num_waiting=6,
    num_running=8,
    num_preemptions=2,
    num_handoffs=11,
    num_failed_handoffs=1,
    num_prompt_tokens=900,
    num_generation_tokens=311,
    num_drafts=50,
    num_draft_tokens=100,
    num_accepted_tokens=70,
    num_accepted_tokens_per_pos=[45, 25],
    plane_bytes={"ub": 1000, "rdma": 20},
    cache=CacheStats(
        num_queried=5000,
        num_hits=1000,
        num_pool_queried=3000,
        num_pool_hits=2000,
        num_fetches=12,
        num_declined=3,
        num_failed_lookups=9,
        num_failed_loads=4,
        num_stored=90,
        num_failed_stores=2,
    ),
)
COUNTERS = Counters(
    num_puts=95, num_refused=1, hits={"dram": 60, "disk": 7}, num_misses=30, bytes_read=670, bytes_written=950
)  # fmt: skip
MEMORY = NodeStats("node0", 0, "local", True, 94, 800, 1000, 940, 10_000, 50, COUNTERS)
SERVER = NodeStats("10.0.0.1:6379", 1, "redis", False, 0, 0, 0, 0, 0, 0, Counters(num_errors=5, evictions={"redis": 8}))


def engine_of(stats=lambda: STATS, *nodes):
    pool = SimpleNamespace(stats=lambda: PoolStats(1, nodes, ())) if nodes else None
    return SimpleNamespace(stats=stats, pool=pool)


def make_metrics(**options):
    return Metrics(engine_of(), "demo", **options)


def values(metrics):
    """(name of a sample without vllm:, labels but the common two) -> value; what is about the process is left out."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.startswith(("process_", "python_info", "http_requests")):
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in LABELS} == LABELS
            key = sample.name.removeprefix("vllm:"), *(value for _, value in sorted(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_a_request_s_times_and_lengths_go_into_the_histograms():
    metrics = make_metrics()
    times = RequestTimes(
        arrival=100.0, scheduled=100.5, prefilled=102.0, first_token=103.0, last_token=111.0, finished=111.25
    )
    metrics.count_prompt(30)
    # Five tokens in three chunks: the first has no gap before it.
    for num_tokens, gap_s in ((1, None), (3, 6.0), (1, 2.0)):
        metrics.count_chunk(num_tokens, gap_s)
    metrics.observe(times, num_tokens=5, decode_s=8.0, max_tokens=64, n=2, success_reason="stop")
    found = values(metrics)
    expected = {
        "time_to_first_token_seconds": (3.0, 1),
        "inter_token_latency_seconds": (2.0 + 2.0 + 2.0 + 2.0, 4),
        "inter_chunk_latency_seconds": (6.0 + 2.0, 2),
        "request_time_per_output_token_seconds": (2.0, 1),
        "e2e_request_latency_seconds": (11.0, 1),
        "request_queue_time_seconds": (0.5, 1),
        "request_prefill_time_seconds": (1.5, 1),
        "request_decode_time_seconds": (8.0, 1),
        "request_inference_time_seconds": (10.5, 1),
        "request_prompt_tokens": (30, 1),
        "request_generation_tokens": (5, 1),
        "request_params_n": (2, 1),
        "request_params_max_tokens": (64, 1),
    }
    assert {name: (found[f"{name}_sum",], found[f"{name}_count",]) for name in expected} == expected
    named = {name[0] for name in found if name[0].endswith("_bucket")}
    assert named == {f"{name}_bucket" for name in (*expected, "event_loop_lag_seconds")}
    assert found["request_success_total", "stop"] == 1
    assert (found["prompt_tokens_total",], found["generation_tokens_total",]) == (30, 5)


def test_buckets_are_vllm_s():
    found = values(make_metrics())
    bounds = {}
    for name, *rest in found:
        if name.endswith("_bucket"):
            bounds.setdefault(name.removesuffix("_bucket"), []).append(float(rest[0]))
    assert all(ends == sorted(ends) and ends[-1] == math.inf for ends in bounds.values())
    ends = {name: (one[0], one[-2]) for name, one in bounds.items()}
    assert ends["event_loop_lag_seconds"] == (0.001, 30)
    assert ends["time_to_first_token_seconds"] == (0.001, 2560)
    assert ends["inter_token_latency_seconds"] == (0.01, 80)
    assert ends["e2e_request_latency_seconds"] == ends["request_queue_time_seconds"] == (0.3, 7680)


def test_what_did_not_happen_to_a_request_is_in_no_histogram():
    metrics = make_metrics()
    common = {"decode_s": 0.0, "n": 1}
    metrics.observe(
        RequestTimes(arrival=1.0, finished=2.0), num_tokens=0, max_tokens=8, success_reason="abort", **common
    )
    one_token = RequestTimes(arrival=1.0, scheduled=1.0, prefilled=2.0, first_token=2.0, last_token=2.0, finished=2.0)
    metrics.count_chunk(1, None)
    metrics.count_chunk(0, 0.5)  # nothing came, but how it ended
    metrics.observe(one_token, num_tokens=1, max_tokens=1, success_reason="length", **common)
    found = values(metrics)
    # One token has no time between tokens, and no token no time to the first.
    for name in ("request_time_per_output_token", "inter_token_latency", "inter_chunk_latency"):
        assert found[f"{name}_seconds_count",] == 0
    assert found["time_to_first_token_seconds_count",] == found["request_queue_time_seconds_count",] == 1
    assert found["request_generation_tokens_count",] == 2
    assert found["request_success_total", "abort"] == found["request_success_total", "length"] == 1


def test_the_engine_s_statistics_are_read_at_each_scrape():
    now = [STATS]
    metrics = Metrics(engine_of(lambda: now[0]), "demo")
    found = values(metrics)
    expected = {
        ("num_requests_running",): 8,
        ("num_requests_waiting",): 6,
        ("kv_cache_usage_perc",): 0.25,
        ("num_preemptions_total",): 2,
        ("prefix_cache_queries_total",): 5000,
        ("prefix_cache_hits_total",): 1000,
        ("external_prefix_cache_queries_total",): 3000,
        ("external_prefix_cache_hits_total",): 2000,
        ("prefix_cache_fetches_total",): 12,
        ("prefix_cache_declined_blocks_total",): 3,
        ("prefix_cache_failed_lookups_total",): 9,
        ("prefix_cache_failed_loads_total",): 4,
        ("prefix_cache_stored_blocks_total",): 90,
        ("prefix_cache_failed_stores_total",): 2,
        ("spec_decode_num_drafts_total",): 50,
        ("spec_decode_num_draft_tokens_total",): 100,
        ("spec_decode_num_accepted_tokens_total",): 70,
        ("spec_decode_num_accepted_tokens_per_pos_total", "0"): 45,
        ("spec_decode_num_accepted_tokens_per_pos_total", "1"): 25,
        ("kv_handoffs_total",): 11,
        ("nixl_num_failed_transfers_total",): 1,
        ("plane_bytes_total", "ub"): 1000,
        ("plane_bytes_total", "rdma"): 20,
        ("instance_requests", "prefill0", "prefill"): 4,
        ("instance_requests", "decode0", "decode"): 5,
        ("instance_kv_usage", "prefill0", "prefill"): 0.25,
        ("instance_kv_usage", "decode0", "decode"): 0.25,
        ("instance_tokens_total", "prefill0", "prefill"): 900,
        ("instance_tokens_total", "decode0", "decode"): 300,
        ("instance_expert_imbalance", "prefill0", "prefill"): 1.0,
        ("instance_expert_imbalance", "decode0", "decode"): 1.5,
    }
    assert {key: found.get(key) for key in expected} == expected
    now[0] = dataclasses.replace(STATS, instances=[], num_running=0, num_preemptions=4)
    found = values(metrics)
    assert found["num_requests_running",] == 0
    assert found["kv_cache_usage_perc",] == 0
    assert found["num_preemptions_total",] == 4
    assert not [key for key in found if key[0].startswith("instance_")]


def test_the_nodes_of_the_memory_pool_are_asked_at_each_scrape():
    found = values(Metrics(engine_of(lambda: STATS, MEMORY, SERVER), "demo"))
    of_memory = {
        ("up",): 1,
        ("keys",): 94,
        ("bytes", "dram"): 800,
        ("bytes", "disk"): 940,
        ("capacity_bytes", "dram"): 1000,
        ("capacity_bytes", "disk"): 10_000,
        ("queued_bytes",): 50,
        ("hits_total", "dram"): 60,
        ("hits_total", "disk"): 7,
        ("misses_total",): 30,
        ("puts_total",): 95,
        ("read_bytes_total",): 670,
        ("written_bytes_total",): 950,
        ("evictions_total", "dram"): 0,
        ("evictions_total", "disk"): 0,
        **{("failures_total", reason): 0 for reason in ("lost", "unwritten", "corrupt", "error")},
        ("failures_total", "refused"): 1,
    }
    of_server = dict.fromkeys((key if len(key) == 1 else (key[0], "redis") for key in of_memory), 0)
    del of_server["failures_total", "redis"]
    of_server |= {key: 0 for key in of_memory if key[0] == "failures_total"}
    of_server |= {("evictions_total", "redis"): 8, ("failures_total", "error"): 5}
    for node, expected in ((MEMORY, of_memory), (SERVER, of_server)):
        own = {
            (key[0].removeprefix("pool_node_"), *key[2:]): value for key, value in found.items() if node.name in key[1:]
        }
        assert own == expected
    assert not [key for key in values(make_metrics()) if key[0].startswith("pool_")]


def test_every_way_to_end_is_there_from_the_start():
    found = values(make_metrics())
    ends = {key[1]: value for key, value in found.items() if key[0] == "request_success_total"}
    assert ends == {"stop": 0, "length": 0, "abort": 0, "error": 0}


def test_servers_of_one_process_keep_their_numbers_and_names_apart():
    one, other = make_metrics(), make_metrics(prefix="cmjax_")
    one.count_prompt(4)
    names = [
        {family.name: family for family in text_string_to_metric_families(m.render().decode())} for m in (one, other)
    ]
    assert {name.removeprefix("vllm:") for name in names[0]} == {name.removeprefix("cmjax_") for name in names[1]}
    counts = [
        next(sample.value for sample in families[name].samples if sample.name.endswith("_count"))
        for families, name in zip(names, ("vllm:request_prompt_tokens", "cmjax_request_prompt_tokens"), strict=True)
    ]
    assert counts == [1, 0]
    assert one.content_type.startswith("text/plain")
