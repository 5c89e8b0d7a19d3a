"""The fit: a handful of numbers of the Ascend die, from the published figures of single operators and of nothing else.

It reads `data/operators.toml` alone (tables 6 to 9, figure 14, XCCL). No end-to-end figure is in that file, and this
module knows no other. The order:

1. the latency of an exchange, from few and many tokens (XCCL);
2. the efficiency of a matrix product, the mean of table 9;
3. the launch of an operator: what the attention stream of figure 14 leaves, by the operators on it;
4. the slowdown of an exchange in a step over its benchmark alone: what the MoE stream of figure 14 leaves, by the
   exchanges' bytes.
"""

from cmjax.model import ModelConfig
from cmjax.perf.hardware import Hardware, operators
from cmjax.perf.layout import Layout
from cmjax.perf.price import Pricing, stage_parts
from cmjax.perf.work import ATTENTION_STREAM, MOE_STREAM


def fit_ascend(config: ModelConfig, machine: Hardware) -> dict[str, float]:
    """The fitted numbers by name, for `config`, the model of figure 14 (DeepSeek-R1)."""
    published = operators()
    fitted = {name: _latency(published["exchange"]["xccl"], name.split("_")[0]) for name in _LATENCIES}
    utilization = published["gemm"]["utilization"]
    fitted["matmul_efficiency"] = sum(utilization) / len(utilization)
    fitted |= {"launch_s": 0.0, "exchange_slowdown": 1.0}
    streams = published["streams"]
    layout = Layout(
        config=config,
        phase="decode",
        ep_size=streams["ep_size"],
        batch=streams["batch_per_npu"] // 2,
        context=streams["context"],
        drafts=streams["drafts"],
        microbatches=2,
        balance=machine.balance,
    )
    cores = streams["attention_cores"] + streams["moe_cores"]
    share = streams["attention_cores"] / cores
    bare = machine.with_figures("fitted", "operators.toml", **fitted)
    left = streams["attention_us"] * 1e-6 - _stream(layout, bare, ATTENTION_STREAM, share)
    once = bare.with_figures("fitted", "operators.toml", launch_s=1e-6)
    num_operators = (
        _stream(layout, once, ATTENTION_STREAM, share) - _stream(layout, bare, ATTENTION_STREAM, share)
    ) / 1e-6
    fitted["launch_s"] = max(0.0, left / num_operators)
    bare = machine.with_figures("fitted", "operators.toml", **fitted)
    left = streams["moe_us"] * 1e-6 - _stream(layout, bare, MOE_STREAM, 1 - share)
    slower = bare.with_figures("fitted", "operators.toml", exchange_slowdown=2.0)
    by_bytes = _stream(layout, slower, MOE_STREAM, 1 - share) - _stream(layout, bare, MOE_STREAM, 1 - share)
    fitted["exchange_slowdown"] = max(1.0, 1 + left / by_bytes)
    return fitted


_LATENCIES = ("dispatch_latency_s", "combine_latency_s")


def _latency(xccl: dict, what: str) -> float:
    """Seconds of an exchange of no token: the line through few and many tokens."""
    (few, many), (short, long) = xccl["tokens"], xccl[f"{what}_us"]
    return (short - few * (long - short) / (many - few)) * 1e-6


def _stream(layout: Layout, machine: Hardware, stages: tuple[str, ...], share: float) -> float:
    """Seconds of one microbatch's layer on its stream: the scan's section, lane a."""
    tokens = layout.tokens // 2
    data = layout.expected(tokens)
    longest = max(stage.calls for stage in layout.counts())
    return sum(
        stage_parts(stage, data, tokens, layout, machine, Pricing()).on(share)
        for stage in layout.counts()
        if stage.lane == "a" and stage.calls == longest and stage.stage in stages
    )
