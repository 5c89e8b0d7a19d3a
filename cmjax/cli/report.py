"""What commands say of a machine and of a generation, as JSON-ready values."""

import dataclasses
import platform

import jax
import jaxlib
import numpy as np

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.kernels import status as kernel_status
from cmjax.mesh import Instance, Pools, Supernode, describe, fabric
from cmjax.mesh.fabric import TrafficSnapshot
from cmjax.model import ModelConfig, placed_layer_names
from cmjax.moe import ExpertPlacement
from cmjax.serve import Engine, GenerateResult
from cmjax.text import JsonObject


def machine_report(pools: Pools) -> JsonObject:
    """All that `cmjax info` says, as JSON-ready values."""
    machine = pools.supernode
    return {
        "versions": {
            "cmjax": cmjax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
        },
        "devices": describe(pools.devices),
        "supernode": _supernode(machine),
        "instances": [_instance(one, machine) for one in pools.instances],
        "prefill_shares_decode_devices": pools.is_shared,
        "planes": [dataclasses.asdict(plane) for plane in machine.planes],
        "collectives": {name: dataclasses.asdict(form) for name, form in fabric.status().items()},
        "kernels": {
            name: dataclasses.asdict(form)
            for name, form in kernel_status(str(describe(pools.devices)["platform"])).items()
        },
    }


def _supernode(machine: Supernode) -> JsonObject:
    counts = ("num_nodes", "num_npus", "num_dies", "num_cpus", "num_ranks", "ranks_per_npu", "ranks_per_node")
    chips = ("num_l1_chips", "num_l2_chips", "rank_memory_bytes")
    return {"name": machine.name, **{name: getattr(machine, name) for name in counts + chips}}


def _instance(one: Instance, machine: Supernode) -> JsonObject:
    first, last = machine.location(one.ranks[0]), machine.location(one.ranks[-1])
    return {
        "name": one.name,
        "role": one.role,
        "ep_size": one.ep_size,
        "ranks": [one.ranks[0], one.ranks[-1]],
        "npus": [first.npu, last.npu],
        "nodes": [first.node, last.node],
        "device_ids": [one.devices[0].id, one.devices[-1].id],
    }


def run_report(
    engine: Engine, result: GenerateResult, traffic: TrafficSnapshot, tokenizer: Tokenizer | None
) -> JsonObject:
    """All that `cmjax generate` says, as JSON-ready values; outputs have text where there is a tokenizer."""
    machine = machine_report(engine.pools)
    config = engine.model.config
    settings = dataclasses.asdict(engine.settings)
    settings["exchange"] = engine.settings.exchange.__name__
    # What was not asked for (log probabilities) is not there.
    outputs = [{k: v for k, v in dataclasses.asdict(output).items() if v is not None} for output in result.outputs]
    if tokenizer is not None:
        for output in outputs:
            output |= {"prompt": tokenizer.decode(output["prompt_ids"]), "text": tokenizer.decode(output["token_ids"])}
    return {
        "outputs": outputs,
        "timings": timings(result),
        "kept_drafts": result.kept_drafts.tolist(),
        "traffic": traffic_by_plane(traffic),
        "expert_load": {
            "prefill": load_by_layer(config, result.prefill_load),
            "decode": load_by_layer(config, result.decode_load),
        },
        "instances": placed_instances(engine, machine),
        "settings": settings,
        **{name: machine[name] for name in ("versions", "devices", "supernode", "planes", "collectives", "kernels")},
        "prefill_shares_decode_devices": machine["prefill_shares_decode_devices"],
    }


def timings(result: GenerateResult) -> dict[str, float]:
    """Seconds, counts and rates of a generation."""
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return dataclasses.asdict(result.timings) | {name: getattr(result.timings, name) for name in rates}


def traffic_by_plane(traffic: TrafficSnapshot) -> dict[str, dict[str, dict[str, int]]]:
    """Calls and bytes of each collective on each plane; `bytes` left their device, `local_bytes` did not."""
    planes: dict[str, dict[str, dict[str, int]]] = {}
    for entry in traffic.entries:
        counts = {"calls": entry.calls, "bytes": entry.wire_bytes, "local_bytes": entry.local_bytes}
        planes.setdefault(entry.plane, {})[entry.collective] = counts
    return planes


def load_by_layer(config: ModelConfig, load: np.ndarray) -> dict[str, list[int]]:
    """Rows by routed expert for each MoE layer; the MTP module's layer is "mtp"."""
    names = placed_layer_names(config)
    return {name: row.tolist() for name, row in zip(names, load, strict=True)}


def placed_instances(engine: Engine, machine: JsonObject) -> list[JsonObject]:
    """The machine's instances, each with the counts of its expert placement (None for a model without experts)."""
    executors = (*engine.prefill, *engine.fleet.decode.values())
    pairs = zip(machine["instances"], executors, strict=True)
    return [described | {"placement": _counts(one.placement)} for described, one in pairs]


def _counts(placement: ExpertPlacement | None) -> dict[str, int] | None:
    if placement is None:
        return None
    counts = ("num_routed_experts", "num_redundant_experts", "num_shared_replicas", "num_experts_per_rank")
    return {name: getattr(placement, name) for name in counts}
