"""Prometheus metrics of the memory pool, node by node."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cmjax.serve.caching import NodeStats
from cmjax.serve.http.backend import Backend

# Name -> its help, the name of the label that its values have beside the node's, and those values by that label.
_Families = Mapping[str, tuple[str, str, Callable[[NodeStats], Mapping[str, float]]]]


def _tiers(node: NodeStats) -> dict[str, tuple[int, int]]:
    """Tier -> bytes, and how many there may be."""
    if node.kind == "redis":
        return {"redis": (node.dram_bytes, node.dram_capacity)}
    tiers = {"dram": (node.dram_bytes, node.dram_capacity), "disk": (node.disk_bytes, node.disk_capacity)}
    return {tier: sizes for tier, sizes in tiers.items() if sizes[1]}


def _failures(node: NodeStats) -> dict[str, float]:
    one = node.counters
    return {
        "refused": one.num_refused,
        "lost": one.num_lost,
        "unwritten": one.num_unwritten,
        "corrupt": one.num_corrupt,
        "error": one.num_errors,
    }


_GAUGES: _Families = {
    "pool_node_up": ("1 while its disk or server answers.", "", lambda node: {"": node.is_up}),
    "pool_node_keys": ("Values it has.", "", lambda node: {"": node.num_keys}),
    "pool_node_bytes": (
        "Bytes of its values.",
        "tier",
        lambda node: {tier: used for tier, (used, _) in _tiers(node).items()},
    ),
    "pool_node_capacity_bytes": (
        "Bytes there is room for; 0 where a server has no limit.",
        "tier",
        lambda node: {tier: most for tier, (_, most) in _tiers(node).items()},
    ),
    "pool_node_queued_bytes": ("Bytes on their way to its disk.", "", lambda node: {"": node.queued_bytes}),
}
# At 0 from the start, so that the first of each is a growth.
_COUNTERS: _Families = {
    "pool_node_hits": (
        "Values found, by tier.",
        "tier",
        lambda node: {tier: node.counters.hits.get(tier, 0) for tier in _tiers(node)},
    ),
    "pool_node_misses": ("Values not found.", "", lambda node: {"": node.counters.num_misses}),
    "pool_node_puts": ("Values put.", "", lambda node: {"": node.counters.num_puts}),
    "pool_node_read_bytes": ("Bytes of values got.", "", lambda node: {"": node.counters.bytes_read}),
    "pool_node_written_bytes": ("Bytes of values put.", "", lambda node: {"": node.counters.bytes_written}),
    "pool_node_evictions": (
        "Values that made room, by tier.",
        "tier",
        lambda node: {tier: node.counters.evictions.get(tier, 0) for tier in _tiers(node)},
    ),
    "pool_node_failures": ("Values refused, lost, not written or corrupt, and other errors.", "reason", _failures),
}


class PoolCollector(Collector):
    """What the nodes count; nothing where there is no pool.

    Args:
        engine: whose pool is asked at each scrape.
        labels: name -> value, of all of them.
        prefix: of every name.
    """

    def __init__(self, engine: Backend, labels: Mapping[str, str], prefix: str) -> None:
        self._engine, self._labels, self._prefix = engine, labels, prefix

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not ask the pool."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask the pool; its servers may take a while to answer."""
        pool = self._engine.pool
        if pool is None:
            return
        nodes = pool.stats().nodes
        for kind, families in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, label, values) in families.items():
                family = kind(self._prefix + name, text, labels=(*self._labels, "node", *([label] if label else [])))
                for node in nodes:
                    for of, value in values(node).items():
                        own = (node.name, of) if label else (node.name,)
                        family.add_metric((*self._labels.values(), *own), value)
                yield family
