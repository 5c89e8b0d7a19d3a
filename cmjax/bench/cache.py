"""What the benchmarks of the prefix cache (`cmjax bench cache`) share: a model, engines of a device an instance, and
prompts that are sent to them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
from jax.typing import DTypeLike

from cmjax.bench import peer
from cmjax.mesh import Supernode, carve
from cmjax.model import Model, ModelConfig, init_params, params_digest
from cmjax.serve import Engine, EngineSettings, RequestHandle, SamplingParams
from cmjax.serve.caching import CacheSettings

# DeepSeek-V3's shape, scaled down to about 150 million parameters.
CONFIG = dataclasses.replace(
    peer.CONFIG, num_hidden_layers=6, num_topk=4, num_topk_groups=2, max_position_embeddings=65536
)
BLOCK_SIZE = 16
# What is being done, how much of it has been, and how much there is in all.
Tell = Callable[[str, int, int | None], None]


def random_model(config: ModelConfig = CONFIG, seed: int = 0, dtype: DTypeLike = ml_dtypes.bfloat16) -> Model:
    """A model of random weights."""
    params = init_params(config, seed, dtype)
    return Model(config, params, params_digest(config, params))


@contextlib.contextmanager
def started(model: Model, settings: EngineSettings, cache: CacheSettings | None) -> Iterator[Engine]:
    """An engine of one prefill and one decode instance, each of one device, whose steps are all compiled."""
    pools = carve(Supernode.of_size(2), ep_size=1, prefill_ep_size=1, num_prefill_instances=1)
    engine = Engine(model, pools, settings=settings, cache=cache)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(timeout=0)


def send(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int = 1) -> list[RequestHandle]:
    """Have prompts that are sent together answered by `max_tokens` tokens each, and wait for that."""
    handles = [engine.submit(prompt, SamplingParams(max_tokens=max_tokens)) for prompt in prompts]
    for handle in handles:
        handle.result()
    return handles


def ttft_s(handle: RequestHandle) -> float:
    """From the arrival of a request that has ended to its first token."""
    assert handle.times.first_token is not None
    return handle.times.first_token - handle.times.arrival


def silent(*_: object) -> None:
    """A `Tell` that says nothing."""
