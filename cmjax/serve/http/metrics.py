"""Prometheus metrics under the names that vLLM's users know."""

from collections.abc import Iterator
from typing import get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cmjax.schedule import CacheStats, EngineStats, FinishReason, RequestTimes
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.pool_metrics import PoolCollector

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
# Of its own: fine where a loop should be, from a millisecond to a second.
_LAG = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 30.0,
)  # fmt: skip
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_LABELS = ("model_name", "engine")
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _TTFT),
    "inter_token_latency_seconds": ("Gap before a chunk over its tokens, for each of them.", _ITL),
    "inter_chunk_latency_seconds": ("Gap between a request's chunks.", _ITL),
    "request_time_per_output_token_seconds": ("(Last token - first token) / (tokens - 1) of a request.", _ITL),
    "e2e_request_latency_seconds": ("From arrival to the end.", _E2E),
    "request_queue_time_seconds": ("From arrival to the first prefill step.", _E2E),
    "request_prefill_time_seconds": ("From there to the first token.", _E2E),
    "request_decode_time_seconds": ("From the first token to the last.", _E2E),
    "request_inference_time_seconds": ("From the first prefill step to the last token.", _E2E),
    "request_prompt_tokens": ("Tokens of a prompt, once whatever n is.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer, as its usage says.", _TOKENS),
    "request_params_n": ("The n of a request.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_params_max_tokens": ("The max_tokens of a request.", _TOKENS),
    "event_loop_lag_seconds": ("What a call would have waited for the event loop, 100 times a second.", _LAG),
}


class Metrics:
    """The metrics of one server; each has a registry of its own.

    Args:
        engine: whose `stats()`, and its pool's, are read at each scrape.
        model_name: a label.
        prefix: of every name.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Backend, model_name: str, prefix: str = "vllm:") -> None:
        self._labels, self._prefix = (model_name, "0"), prefix
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(prefix + name, text, _LABELS, buckets=buckets, registry=self._registry).labels(
                *self._labels
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            f"{prefix}request_success",
            "Requests by how they ended.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in get_args(FinishReason):  # at 0 from the start, so that the first of each is a growth
            self._success.labels(*self._labels, reason)
        self._internal_errors = self._counter("internal_errors", "Answers that failed in the server itself.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, of each prompt once.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of them, those found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers, as their usage says.")
        # Not under the prefix: it is about HTTP, and is called the same elsewhere.
        self._responses = Counter(
            "http_requests",
            "Responses, by method, route and status.",
            ("method", "handler", "status"),
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_FromEngine(engine, self._labels, prefix))
        self._registry.register(PoolCollector(engine, dict(zip(_LABELS, self._labels, strict=True)), prefix))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(self._prefix + name, text, _LABELS, registry=self._registry).labels(*self._labels)

    def count_internal_error(self) -> None:
        """Take note of an answer that the server failed to make."""
        self._internal_errors.inc()

    def count_response(self, method: str, handler: str, status: int) -> None:
        """Take note of a response; `handler` is the path of its route."""
        self._responses.labels(method if method in _METHODS else "other", handler, str(status)).inc()

    def observe_lag(self, seconds: float) -> None:
        """Take note of how late the event loop was."""
        self._histograms["event_loop_lag_seconds"].observe(seconds)

    def count_prompt(self, num_tokens: int) -> None:
        """Take note of a prompt to which there is something of an answer, once."""
        self._prompt_tokens.inc(num_tokens)
        self._histograms["request_prompt_tokens"].observe(num_tokens)

    def count_cached(self, num_tokens: int) -> None:
        """Take note of what of a prompt was in the prefix cache, once."""
        self._cached_tokens.inc(num_tokens)

    def count_chunk(self, num_tokens: int, gap_s: float | None) -> None:
        """Take note of a chunk of an answer, so many seconds after the one before; None for the first."""
        self._generation_tokens.inc(num_tokens)
        if gap_s is None or num_tokens == 0:
            return
        self._histograms["inter_chunk_latency_seconds"].observe(gap_s)
        for _ in range(num_tokens):
            self._histograms["inter_token_latency_seconds"].observe(gap_s / num_tokens)

    def observe(
        self, times: RequestTimes, *, num_tokens: int, decode_s: float, max_tokens: int, n: int, success_reason: str
    ) -> None:
        """Take note of a request that is over, once.

        Args:
            times: the engine's.
            num_tokens: of its answer.
            decode_s: seconds from the first chunk of it to the last.
            max_tokens, n: what it asked for.
            success_reason: how it ended.
        """
        values: dict[str, float | None] = {
            "request_generation_tokens": num_tokens,
            "request_params_n": n,
            "request_params_max_tokens": max_tokens,
            "time_to_first_token_seconds": _between(times.arrival, times.first_token),
            "e2e_request_latency_seconds": _between(times.arrival, times.last_token),
            "request_queue_time_seconds": _between(times.arrival, times.scheduled),
            "request_prefill_time_seconds": _between(times.scheduled, times.prefilled),
            "request_decode_time_seconds": _between(times.first_token, times.last_token),
            "request_inference_time_seconds": _between(times.scheduled, times.last_token),
        }
        if num_tokens > 1 and decode_s > 0:  # none where all came in one chunk
            values["request_time_per_output_token_seconds"] = decode_s / (num_tokens - 1)
        for name, value in values.items():
            if value is not None:
                self._histograms[name].observe(value)
        self._success.labels(*self._labels, success_reason).inc()

    def render(self) -> bytes:
        """All of them, in Prometheus's text form; may take a while, see `PoolCollector`."""
        return generate_latest(self._registry)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(end - begin, 0.0)


def _of_cache(cache: CacheStats) -> dict[str, tuple[str, int]]:
    """What is counted of the prefix cache; of the first four, vLLM's, hits over queries is a hit rate."""
    return {
        "prefix_cache_queries": ("Prompt tokens looked up in the instances' own blocks.", cache.num_queried),
        "prefix_cache_hits": ("Of them, found there.", cache.num_hits),
        "external_prefix_cache_queries": ("Of the others, looked up in the memory pool.", cache.num_pool_queried),
        "external_prefix_cache_hits": ("Of these, loaded from it.", cache.num_pool_hits),
        "prefix_cache_fetches": ("Fetches of blocks from the pool that began.", cache.num_fetches),
        "prefix_cache_declined_blocks": ("Blocks of the pool that were sooner computed.", cache.num_declined),
        "prefix_cache_failed_lookups": (
            "Requests of which the pool did not say in time what it has.",
            cache.num_failed_lookups,
        ),
        "prefix_cache_failed_loads": ("Blocks that did not come, in time and whole.", cache.num_failed_loads),
        "prefix_cache_stored_blocks": ("Blocks put into the pool.", cache.num_stored),
        "prefix_cache_failed_stores": ("Blocks that the pool did not take.", cache.num_failed_stores),
    }


class _FromEngine(Collector):
    """What the engine counts itself."""

    def __init__(self, engine: Backend, labels: tuple[str, str], prefix: str) -> None:
        self._engine, self._labels, self._prefix = engine, labels, prefix

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the engine's statistics."""
        stats: EngineStats = self._engine.stats()
        gauges = {
            "num_requests_running": ("Requests between admission and end.", stats.num_running),
            "num_requests_waiting": ("Requests without a place.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the decode instances' cache blocks in use, 0 to 1.", stats.kv_usage),
        }
        counters = {
            "num_preemptions": ("Requests that had to give their blocks back.", stats.num_preemptions),
            "spec_decode_num_drafts": ("Steps of a request with drafts.", stats.num_drafts),
            "spec_decode_num_draft_tokens": ("Drafts made.", stats.num_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Drafts kept.", stats.num_accepted_tokens),
            "kv_handoffs": ("Prompts whose KV arrived at a decode instance.", stats.num_handoffs),
            "nixl_num_failed_transfers": (
                "Hand-offs that had to be sent again or given up.",
                stats.num_failed_handoffs,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        counters |= _of_cache(stats.cache)
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(self._prefix + name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        yield from self._with_more_labels(stats)

    def _with_more_labels(self, stats: EngineStats) -> Iterator[Metric]:
        name = f"{self._prefix}spec_decode_num_accepted_tokens_per_pos"
        places = CounterMetricFamily(name, "Drafts kept, by place.", labels=(*_LABELS, "position"))
        for place, kept in enumerate(stats.num_accepted_tokens_per_pos):
            places.add_metric((*self._labels, str(place)), kept)
        yield places
        planes = CounterMetricFamily(f"{self._prefix}plane_bytes", "Bytes sent, by plane.", labels=(*_LABELS, "plane"))
        for plane, num_bytes in stats.plane_bytes.items():
            planes.add_metric((*self._labels, plane), num_bytes)
        yield planes
        labels = (*_LABELS, "instance", "role")
        running = GaugeMetricFamily(f"{self._prefix}instance_requests", "Requests of an instance.", labels=labels)
        blocks = GaugeMetricFamily(f"{self._prefix}instance_kv_usage", "Share of its blocks in use.", labels=labels)
        tokens = CounterMetricFamily(f"{self._prefix}instance_tokens", "Tokens it has computed.", labels=labels)
        imbalance = GaugeMetricFamily(
            f"{self._prefix}instance_expert_imbalance",
            "Rows that the experts of its busiest device received over the mean of its devices, of late.",
            labels=labels,
        )
        for one in stats.instances:
            own = (*self._labels, one.name, one.role)
            running.add_metric(own, one.num_running + one.num_waiting)
            blocks.add_metric(own, one.num_used_blocks / max(one.num_blocks, 1))
            tokens.add_metric(own, one.num_tokens)
            imbalance.add_metric(own, one.expert_imbalance)
        yield from (running, blocks, tokens, imbalance)
