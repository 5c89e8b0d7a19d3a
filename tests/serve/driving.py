"""Driving the serving steps by hand: prompts through prefill, hand-off and decode, with every position's logits."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from cmjax.mesh import Supernode, carve
from cmjax.model import Model, token_order
from cmjax.serve import DecodeInstance, Engine, EngineSettings, SamplingParams, decode, hand_off, prefill
from cmjax.serve.prefill_instance import Prefilled, PrefillInstance
from cmjax.serve.request import Request
from tests.parity import ParityCase

MACHINE = Supernode.preset("cloudmatrix384")


def make_engine(
    model: Model,
    ep_size: int,
    *,
    prefill_ep_size: int | None = None,
    num_prefill_instances: int | None = 1,
    num_decode_instances: int = 1,
    **settings: Any,
) -> Engine:
    """An engine on the preset machine, with small settings."""
    pools = carve(
        MACHINE,
        ep_size=ep_size,
        prefill_ep_size=prefill_ep_size,
        num_prefill_instances=num_prefill_instances,
        num_decode_instances=num_decode_instances,
    )
    defaults = {"max_model_len": 96, "max_num_seqs_per_rank": 1, "max_num_batched_tokens": 64, "steps_per_call": 4}
    return Engine(model, pools, settings=EngineSettings(**{**defaults, **settings}))


def model_of(case: ParityCase) -> Model:
    """The model of a parity case."""
    return Model(case.config, case.params, case.digest)


def make_requests(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Request]:
    """One request a prompt, all with the same limit."""
    sampling = SamplingParams(max_tokens=max_tokens)
    return [Request(f"prompt {i}", [int(token) for token in prompt], sampling) for i, prompt in enumerate(prompts)]


def fill_cache(target: DecodeInstance) -> None:
    """Zeros for latents: a new cache holds whatever the memory did, and a test may decode without a prompt before."""
    target.cache = jax.device_put(np.zeros(target.cache.shape, target.cache.dtype), target.spec.by_rank())


def reserve(target: DecodeInstance, requests: Sequence[Request]) -> None:
    """Give every request a place and blocks on a decode rank."""
    for request in requests:
        assert target.router.reserve(request)


def prefill_by_step(
    source: PrefillInstance, requests: Sequence[Request]
) -> Iterator[tuple[list[Prefilled], dict[int, np.ndarray]]]:
    """Prefill the prompts; yields each step's ended prompts, and the logits `[tokens, V]` it computed by request.

    The prompts' blocks stay taken until the caller releases them.
    """
    index = {request: place for place, request in enumerate(requests)}
    for request in requests:
        source.router.add(request)
    while chunks := source.router.next_step(source.num_step_tokens, source.max_sequences):
        batch = source.pack(chunks)
        output = prefill(
            source.params, source.expert_to_slot, source.cache, batch, spec=source.spec, with_all_logits=True
        )
        source.cache = output.cache
        order = token_order(source.num_step_tokens, source.instance.ep_size, source.spec.rank.microbatches)
        all_logits, token_ids = np.asarray(output.all_logits)[order], np.asarray(output.token_ids)
        ended, logits, begin = [], {}, 0
        for row, chunk in enumerate(chunks):
            end = begin + chunk.stop - chunk.start
            logits[index[chunk.request]] = all_logits[begin:end]
            begin = end
            if chunk.is_last:
                ended.append(Prefilled(chunk.request, chunk.blocks, row, output.last_hidden, int(token_ids[row])))
        source.router.computed(chunks)
        yield ended, logits


def prefill_and_hand_off(
    source: PrefillInstance, target: DecodeInstance, requests: Sequence[Request]
) -> tuple[list[Prefilled], list[np.ndarray]]:
    """Prefill the prompts and hand each to its reserved place; also every prompt's logits `[length, V]`."""
    everyone: list[Prefilled] = []
    parts: list[list[np.ndarray]] = [[] for _ in requests]
    for ended, logits in prefill_by_step(source, requests):
        hand_off(source, target, ended)
        everyone += ended
        for index, part in logits.items():
            parts[index].append(part)
    return everyone, [np.concatenate(part) for part in parts]


@dataclasses.dataclass
class Columns:
    """Where requests sit in the arrays `[places of all ranks]` of a decode batch."""

    index: list[int]
    size: int

    @classmethod
    def of(cls, target: DecodeInstance, requests: Sequence[Request]) -> "Columns":
        places = target.settings.max_num_seqs_per_rank
        return cls([r.decode_rank * places + r.decode_place for r in requests], target.instance.ep_size * places)


def step_through(engine: Engine, sequences: Sequence[Sequence[int]], num_prompt: int) -> np.ndarray:
    """Logits `float32[B, S, V]` of `sequences int[B, S]`: the first `num_prompt` tokens by prefill, the rest by decode.

    Decode is fed the sequences token by token. Places and blocks are given back.
    """
    sequences = np.asarray(sequences)
    num_steps = sequences.shape[1] - num_prompt
    target, source = engine.decode, engine.prefill[0]
    requests = make_requests(sequences[:, :num_prompt], num_steps + 1)
    reserve(target, requests)
    columns = Columns.of(target, requests)
    forced = np.full((num_steps, columns.size), -1, np.int32)
    forced[: num_steps - 1, columns.index] = sequences[:, num_prompt + 1 :].T
    arguments = (target.params, target.expert_to_slot, target.cache)
    batch = jax.device_put(target.host_state(), target.spec.by_rank())
    lowered = decode.lower(*arguments, batch, forced, spec=target.spec, num_steps=num_steps, with_logits=True)
    with ThreadPoolExecutor(1) as threads:
        compiling = threads.submit(lowered.compile)  # compiling is most of the time: both steps at once
        ended, prompt_logits = prefill_and_hand_off(source, target, requests)
    for request, row in zip(requests, sequences, strict=True):
        request.token_ids.append(int(row[num_prompt]))
    batch = jax.device_put(target.host_state(), target.spec.by_rank())
    output = compiling.result()(target.params, target.expert_to_slot, target.cache, batch, forced)
    target.cache = output.cache
    decoded = np.asarray(output.logits)[:, columns.index].transpose(1, 0, 2)
    for request in requests:
        target.router.release(request)
    for one in ended:
        source.router.release(one.request)
    return np.concatenate([np.stack(prompt_logits), decoded], axis=1)
