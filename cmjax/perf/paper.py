"""Every published figure beside what is predicted for it: tables 1 to 4 and 6 to 9, ablations, other systems.

`data/published.toml` and `data/gpu_decode.csv` hold what was published; nothing here is fitted. Tables 6 to 8 are what
the machine's numbers are made of, so that their rows only say whether the pricing gives back what it was given.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cmjax.model import ModelConfig
from cmjax.perf import points
from cmjax.perf.hardware import Hardware, hardware, operators
from cmjax.perf.layout import Layout, abstract_bytes, latent_bytes
from cmjax.perf.points import faster, tokens_a_step
from cmjax.perf.price import Pricing, StepPrice, price
from cmjax.text import JsonObject

Row = Mapping[str, Any]
# GPUs serve FP8 weights; the engine's prefill caches what it would not have to on a GPU.
_FREE = Pricing(check_memory=False)
_GROUP_GPU = "InferenceX (ai-dynamo/aiconfigurator)"

_GPU_REASON = "efficiencies of H800's operators stand for Blackwell's"
# Why rows miss, where we believe to know.
REASONS = {
    "DeepSeek H800 (profile), 4K prompts": "GPU prefill: quantization and masks between products cost more than a pass",
    "SGLang H100 (default), 4K prompts": "as DeepSeek's profile, and EPLB's balance of production is not known",
    "SGLang H100 (perfect EPLB), 4K prompts": "as DeepSeek's profile",
    "SGLang 96 H100, prefill EP32, 1K prompts": "as the 4K prompts",
    "SGLang 96 H100, prefill EP32, 2K prompts": "as the 4K prompts",
    "SGLang 96 H100, decode EP72, 256 a GPU, 2K": "two batches hide all of the exchange here, and none in one batch "
    "(107 ms a step; 92 were measured): what SGLang hides lies between",
    "SGLang GB200, decode EP48, 1,408 a GPU, 2K": "H800's operators stand for those of a GB200, and exchanges of "
    "1,408 tokens are taken at NVLink's rate",
    "warm start from pooled DRAM, s": "UB alone would take a fraction of a second; what else the 5 s hold is not said",
    "mean switch among 8 models, EMS, s": "as the warm start",
    "cold start from OBS, one instance at a time (EMS), s": "671 GB at 2.5 GB/s; the paper's 320 s are more than that",
    "cold start from OBS, 8 instances at once, s": "as for one",
    "mean switch among 8 models, local DRAM cache, s": "as the cold start",
    "CloudMatrix-Infer (default), 4K prompts": "at the same load the paper's TTFT of 2.54 s is 6,450 tok/s: its "
    "table was slower than that, for a reason that is not given",
    "30 ms: 4,096 in, 256 out, batch 24": "a layer takes 80 % more than at batch 8, for a sixth more bytes: what lies "
    "in between, such as how 24 queries are tiled over 24 cores, is not in any operator's figures",
    "context cache over UB, reuse 90 % against none: throughput": "the paper's TTFT has about 0.9 s that reuse does "
    "not shorten; a step of 820 tokens a die has no such part here",
    "context cache over UB, reuse 50 % against 12.5 %: throughput": "as with 90 %",
    "context cache, UB against VPC, at most": "as with 90 %: the fetch is a larger share of a shorter step",
    "TTFT, UB, reuse 90 %": "as the throughput: a fixed part that no operator's figure explains",
    "TTFT, UB, reuse 50 %": "as with 90 %",
    "DeepSeek H800 (profile), batch 128, 4K": "not known; ranks are taken to be balanced and in step, which shortens "
    "a step",
    "50 ms: 1,024 in, 1,024 out, batch 128": "not known; answers are taken to be half written on average",
    "decode microbatches, batch 128, 4K: throughput": "two streams that share the cores do not slow each other's "
    "memory here, which tells most in a large batch",
    "prefill microbatches, 16K tokens an NPU: throughput, over prompt lengths": "an exchange behind the other "
    "microbatch's work takes nothing from it here, such as the memory's rate",
    "prefill microbatches, 4K: layer time": "as the throughput",
    "MTP: the least gain of throughput (large batch, 128)": "not known; where the batch is large a second token costs "
    "about as much here as the first",
    "MTP: the most gain of throughput (small batch, 8)": "weights dominate a small batch, so a second token costs "
    "little here; the paper's own step has more that grows with tokens",
}


def rows() -> list[JsonObject]:
    """The published rows, in their order."""
    text = (resources.files("cmjax.perf") / "data" / "published.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    return [data["defaults"] | row for row in data["row"]]


def compare(config: ModelConfig, tell: Callable[[str], None] = lambda text: None) -> JsonObject:
    """Predict every row: `{"rows": [...], "errors": {...}}`, errors as shares.

    Args:
        config: DeepSeek-R1's, which all rows are of.
        tell: is told each group as it begins.
    """
    results = _operator_rows()
    for row in rows():
        tell(row["group"])
        results.append(_result(row, config))
    tell(_GROUP_GPU)
    with resources.as_file(resources.files("cmjax.perf") / "data" / "gpu_decode.csv") as path:
        found = points.predict(points.read(Path(path)), config, "gpu_decode.csv")
    results += [one | {"group": _GROUP_GPU, "end_to_end": True, "paper": False} for one in found]
    for one in results:
        if one["error"] is not None and abs(one["error"]) > 0.05 and not one["reason"]:
            one["reason"] = REASONS.get(one["label"], _GPU_REASON if one["group"] == _GROUP_GPU else "")
    return {"rows": results, "errors": errors_of(results)}


def errors_of(results: list[JsonObject]) -> JsonObject:
    """Mean absolute and largest error of the end-to-end predictions: the paper's, and other systems'."""
    errors = {}
    for name, is_paper in (("paper", True), ("others", False)):
        found = [
            abs(r["error"]) for r in results if r["end_to_end"] and r["paper"] is is_paper and r["error"] is not None
        ]
        errors[name] = {"rows": len(found), "mean": sum(found) / len(found), "largest": max(found)}
    return errors


def _result(row: JsonObject, config: ModelConfig) -> JsonObject:
    result = {key: row.get(key) for key in ("group", "label", "published", "unit", "end_to_end", "paper")}
    result["unit"] = row.get("unit", "")
    if "reason" in row:
        return result | {"predicted": None, "error": None, "reason": row["reason"]}
    predicted = _KINDS[row["kind"]](row, config, hardware(row["hardware"]))
    return result | {"predicted": predicted, "error": error_of(predicted, row["published"]), "reason": ""}


def error_of(predicted: float, published: float | list[float]) -> float:
    """As a share of what was published; of a range, of the nearer end, and 0 inside."""
    if isinstance(published, list):
        low, high = published
        published = min(max(predicted, low), high)
    return predicted / published - 1


def _layout(row: Row, config: ModelConfig, machine: Hardware, **changes: Any) -> Layout:
    given = {
        "config": config,
        "phase": row.get("phase", "decode"),
        "ep_size": row["ep"],
        "batch": row["batch"],
        "context": row["context"],
        "drafts": row.get("drafts", 0),
        "microbatches": row.get("microbatches", 1),
        "balance": row.get("balance", machine.balance),
        "attention": row.get("attention", "staged"),
        "num_shared_replicas": row.get("shared_replicas"),
    }
    return Layout(**{**given, **changes})


def _decode(row: Row, config: ModelConfig, machine: Hardware) -> float:
    found = faster(_layout(row, config, machine), machine, _FREE, "microbatches" in row)
    tokens = tokens_a_step(row.get("drafts", 0), row.get("acceptance", 0))
    metric = row.get("metric", "tpot")
    if metric == "iteration":
        return found.seconds * 1e3
    if metric == "tok_s":
        return row["batch"] * tokens * machine.devices_per_package / found.seconds
    return found.seconds * 1e3 / tokens


def _prefill_price(row: Row, config: ModelConfig, machine: Hardware, **changes: Any) -> StepPrice:
    return price(_layout(row, config, machine, phase="prefill", **{"microbatches": 2, **changes}), machine, _FREE)


def _prefill(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return row["batch"] * machine.devices_per_package / _prefill_price(row, config, machine).seconds


def _pair(row: Row, config: ModelConfig, machine: Hardware) -> tuple[StepPrice, StepPrice]:
    one, two = (price(_layout(row, config, machine, microbatches=count), machine, _FREE) for count in (1, 2))
    return one, two


def _microbatches(row: Row, config: ModelConfig, machine: Hardware) -> float:
    one, two = _pair(row, config, machine)
    return one.seconds / two.seconds


def _microbatch_layer(row: Row, config: ModelConfig, machine: Hardware) -> float:
    one, two = _pair(row, config, machine)
    return two.layer / one.layer


def _layer(row: Row, config: ModelConfig, machine: Hardware) -> float:
    pricing = dataclasses.replace(_FREE, splits=[row["attention_cores"] / machine.cores])
    return price(_layout(row, config, machine, microbatches=2), machine, pricing).layer * 1e6


def _mtp(row: Row, config: ModelConfig, machine: Hardware) -> float:
    without, with_one = (faster(_layout(row, config, machine, drafts=k), machine, _FREE) for k in (0, 1))
    return tokens_a_step(1, row["acceptance"]) * without.seconds / with_one.seconds


def _ttft_of(row: Row, config: ModelConfig, machine: Hardware, reuse: float, plane: str = "ub") -> float:
    """Seconds of a step whose prompts are there already to a share of `reuse`: fetched from the pool, each die its own
    part, then spread over UB, since every rank attends to all."""
    batch = max(2, round(row["batch"] * (1 - reuse) / 2) * 2)
    step = _prefill_price(row, config, machine, batch=batch, cached=row["context"] * reuse).seconds
    latents = row["batch"] * reuse * latent_bytes(config)
    rate = machine.host_bytes_per_s if plane == "ub" else machine.storage_bytes_per_s / machine.devices_per_node
    spread = latents * (row["ep"] - 1) / machine.bulk_bytes_per_s("dispatch", row["ep"])
    return step + latents / rate + spread


def _ttft(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return _ttft_of(row, config, machine, row["reuse"])


def _reuse(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return _ttft_of(row, config, machine, row["base"]) / _ttft_of(row, config, machine, row["reuse"])


def _planes(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return _ttft_of(row, config, machine, row["reuse"], "vpc") / _ttft_of(row, config, machine, row["reuse"])


def _load(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return abstract_bytes(config) * row.get("instances", 1) / row["source_bytes_per_s"]


def _warm(row: Row, config: ModelConfig, machine: Hardware) -> float:
    return abstract_bytes(config) / (row["ep"] * machine.host_bytes_per_s)


def _switch(row: Row, config: ModelConfig, machine: Hardware) -> float:
    hit = row["hit_rate"]
    return hit * _warm(row, config, machine) + (1 - hit) * _load(row, config, machine)


_KINDS: dict[str, Callable[[Row, ModelConfig, Hardware], float]] = {
    "decode": _decode,
    "prefill": _prefill,
    "microbatches": _microbatches,
    "microbatch_layer": _microbatch_layer,
    "layer": _layer,
    "mtp": _mtp,
    "ttft": _ttft,
    "reuse": _reuse,
    "planes": _planes,
    "load": _load,
    "warm": _warm,
    "switch": _switch,
}


def _operator_rows() -> list[JsonObject]:
    """Tables 6 to 9: operators, which the machines' numbers are made of."""
    published, found = operators(), []

    def add(group: str, label: str, unit: str, given: float, predicted: float, reason: str = "") -> None:
        found.append(
            {"group": group, "label": label, "unit": unit, "published": given, "predicted": predicted,
             "error": error_of(predicted, given), "reason": reason, "end_to_end": False, "paper": True}
        )  # fmt: skip

    for name, machine in (("cann", hardware("ascend-910")), ("deepep", hardware("h800"))):
        table = published["exchange"][name]
        assert machine.table is not None
        for what in ("dispatch", "combine"):
            for degree, us in zip(table["degrees"], table[f"{what}_us"], strict=True):
                label = f"{what}, {machine.name}, EP{degree}"
                add("table 6", label, "us", us, machine.table.seconds(what, degree) * 1e6, "read by the pricing")
    for name, machine in (("ascend", hardware("ascend-910")), ("h800", hardware("h800"))):
        for table, what, value in (
            ("table 7", "compute", machine.attention_efficiency),
            ("table 8", "memory", machine.memory_efficiency),
        ):
            label = f"MLA operator, {what}-bound, {machine.name}"
            add(table, label, "of peak", published["mla"][f"{name}_{what}"], value, "read by the pricing")
    gemm, machine = published["gemm"], hardware("ascend-910")
    shapes = zip(gemm["groups"], gemm["m"], gemm["n"], gemm["k"], gemm["utilization"], gemm["gb_per_s"], strict=True)
    for groups, m, n, k, utilization, rate in shapes:
        seconds = 2 * m * n * k / (machine.peak("int8") * machine.matmul_efficiency)
        label = f"INT8 product, {groups} groups, {m} x {n} x {k}"
        add("table 9", f"{label}: utilization", "of peak", utilization, machine.matmul_efficiency, "fitted: the mean")
        add("table 9", f"{label}: bytes", "GB/s", rate, (m * k + k * n + 2 * m * n) / seconds / 1e9)
    return found
