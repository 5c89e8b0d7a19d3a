"""Driving the serving steps by hand: prompts through prefill, hand-off and decode, with every position's logits."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from cmjax.mesh import Pools, Supernode, carve
from cmjax.model import Model
from cmjax.serve import Engine, EngineSettings, SamplingParams, decode, hand_off, prefill
from cmjax.serve.instance import Prefilled, PrefillInstance
from cmjax.serve.request import Request, plan_chunks

MACHINE = Supernode.preset("cloudmatrix384")


def pools(ep_size: int, prefill_ep_size: int | None = None, num_prefill_instances: int | None = None) -> Pools:
    """Instances of the preset machine."""
    return carve(
        MACHINE, ep_size=ep_size, prefill_ep_size=prefill_ep_size, num_prefill_instances=num_prefill_instances
    )


def make_engine(
    model: Model,
    ep_size: int,
    *,
    prefill_ep_size: int | None = None,
    num_prefill_instances: int | None = 1,
    **settings: object,
) -> Engine:
    """An engine with small settings."""
    defaults = {"max_model_len": 96, "max_num_seqs_per_rank": 1, "max_num_batched_tokens": 64, "steps_per_call": 4}
    return Engine(
        model,
        pools(ep_size, prefill_ep_size, num_prefill_instances),
        settings=EngineSettings(**{**defaults, **settings}),
    )


@dataclasses.dataclass
class Trace:
    """Logits `float32[B, S, V]` of whole sequences, computed by prefill up to `num_prompt` and by decode after it."""

    logits: np.ndarray
    num_prompt: int


def prefill_all(source: PrefillInstance, requests: Sequence[Request]) -> tuple[list[Prefilled], list[np.ndarray]]:
    """Prefill the prompts; also the logits `[length, V]` of each. Their blocks stay taken."""
    lengths = [len(r.prompt_ids) for r in requests]
    tables = [source.pool.take(-(-length // source.settings.block_size)) for length in lengths]
    ended, logits = [], [[] for _ in requests]
    for chunks in plan_chunks(lengths, source.num_step_tokens, source.max_sequences):
        batch = source.pack(requests, tables, chunks)
        output = prefill(
            source.params, source.expert_to_slot, source.cache, batch, spec=source.spec, with_all_logits=True
        )
        source.cache = output.cache
        all_logits, token_ids = np.asarray(output.all_logits), np.asarray(output.token_ids)
        begin = 0
        for row, chunk in enumerate(chunks):
            end = begin + chunk.stop - chunk.start
            logits[chunk.index].append(all_logits[begin:end])
            begin = end
            if chunk.stop == lengths[chunk.index]:
                one = Prefilled(requests[chunk.index], tables[chunk.index], row, output.last_hidden, token_ids[row])
                ended.append(one)
    return ended, [np.concatenate(parts) for parts in logits]


def step_through(engine: Engine, sequences: np.ndarray, num_prompt: int) -> Trace:
    """Prefill the first `num_prompt` tokens of `sequences int[B, S]`, then decode the rest, fed token by token."""
    num_seqs, length = sequences.shape
    num_steps = length - num_prompt
    sampling = SamplingParams(max_tokens=num_steps + 1)
    requests = [Request(i, row[:num_prompt].tolist(), sampling) for i, row in enumerate(sequences)]
    target, source = engine.decode, engine.prefill[0]
    assert all([target.reserve(r) for r in requests])
    ended, prompt_logits = prefill_all(source, requests)
    hand_off(source, target, ended)
    places = engine.settings.max_num_seqs_per_rank
    columns = [r.decode_rank * places + r.decode_place for r in requests]
    forced = np.full((num_steps, target.instance.ep_size * places), -1, np.int32)
    for request, column, row in zip(requests, columns, sequences, strict=True):
        request.token_ids.append(int(row[num_prompt]))
        forced[: num_steps - 1, column] = row[num_prompt + 1 :]
    output = decode(
        target.params,
        target.expert_to_slot,
        target.cache,
        jax.device_put(target.host_batch(), target.spec.by_rank()),
        forced,
        spec=target.spec,
        num_steps=num_steps,
        with_logits=True,
    )
    target.cache = output.cache
    decoded = np.asarray(output.logits)[:, columns].transpose(1, 0, 2)
    for request in requests:
        target.release(request)
    for one in ended:
        source.pool.free(one.blocks)
    return Trace(np.concatenate([np.stack(prompt_logits), decoded], axis=1), num_prompt)
