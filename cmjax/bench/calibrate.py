"""What this machine's operators take, measured one kind at a time: what `--hardware host` is priced with.

Nothing here runs a step of the engine, or knows one. Where N devices share the machine's cores, an operator is timed
between two exchanges, so that the devices take turns as they do in a step, and find their data where it then lies.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.bench.report import machine
from cmjax.mesh import EP_AXIS, bring_up, fabric
from cmjax.model.cache import PagedKeys
from cmjax.model.config import ModelConfig
from cmjax.model.mla import CoreAttention, Softmax, absorbed_part
from cmjax.moe import MlpParams, ReceivedRows, expert_ffn
from cmjax.perf.host import CROWD, PRODUCT_ROWS, HostCosts, counts
from cmjax.quant import linear, matrix_at

Body = Callable[..., Any]  # (x, *others) -> x, on one device
_ROUNDS = 5
_LEAST_S = 1e-9  # where noise would have a difference of times be none
_ROWS, _WIDTH = 8, 64  # of a small operator
_LARGE = 512  # width of one whose arithmetic counts
_EXPERTS, _HIDDEN, _FFN = 16, 256, 128
_LAUNCH_ARGUMENTS = 64  # arrays that a step takes, about


def calibrate(
    ranks: Sequence[int], tell: Callable[[str, int, int], None] = lambda what, done, total: None
) -> HostCosts:
    """Measure; the operators of `ranks` devices each, and the rates of one device and of a crowd."""
    ranks = sorted({1, CROWD, *ranks})
    devices = bring_up(max(ranks))
    ranks = [count for count in ranks if count <= len(devices)]  # costs of more are held
    cores = int(machine()["cores"])
    costs = HostCosts(cores=cores, machine=machine())
    for index, count in enumerate(ranks):
        tell(f"{count} devices", index, len(ranks) + 2)
        _overheads(_Devices(devices[:count]), costs)
    for index, count in enumerate((1, CROWD)):
        tell("arithmetic", len(ranks) + index, len(ranks) + 2)
        _rates(_Devices(devices[:count]), costs)
    return costs


class _Devices:
    """Runs loops of operators on some devices at once."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.mesh = Mesh(np.array(devices, dtype=object), (EP_AXIS,))
        self.count = len(devices)

    def put(self, local: np.ndarray) -> jax.Array:
        """The same array on each device."""
        whole = np.broadcast_to(local, (self.count, *local.shape)).reshape(-1, *local.shape[1:])
        return jax.device_put(whole, NamedSharding(self.mesh, P(EP_AXIS)))

    def jit(self, fn: Body, num_others: int) -> Any:
        """`fn(trips, x, *others)` on every device."""
        specs = (P(), *[P(EP_AXIS)] * (1 + num_others))
        mapped = jax.shard_map(fn, mesh=self.mesh, in_specs=specs, out_specs=P(EP_AXIS), check_vma=False)
        return jax.jit(mapped)

    def seconds(self, body: Body, x: np.ndarray, *others: np.ndarray, least_s: float = 4e-3) -> tuple[float, Any]:
        """Of one turn of `body` on all devices together, and the compiled program; launches are not in it."""

        def loop(trips: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, x: body(x, *others), x)

        arrays = [self.put(one) for one in (x, *others)]
        compiled = self.jit(loop, len(others)).lower(np.int32(1), *arrays).compile()

        def timed(trips: int) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(np.int32(trips), *arrays))
            return time.perf_counter() - begin

        timed(1)
        more = 4
        while (first := timed(1 + more)) < least_s + (launch := timed(1)) and more < 4096:
            more *= max(2, min(16, round(least_s / max(first - launch, 1e-6))))
        found = [(timed(1 + more) - timed(1)) / more for _ in range(_ROUNDS)]
        return max(statistics.median(found), _LEAST_S), compiled


def _overheads(on: _Devices, costs: HostCosts) -> None:
    """Of operators that compute next to nothing, and of exchanges, by the number of devices."""
    count = on.count
    per_core = min(count, costs.cores) / count  # of all devices' time to one operator of one device on its core
    x, others = np.ones((_ROWS, _WIDTH), np.float32), np.eye(_WIDTH, dtype=np.float32)
    turn = _in_turns(count)
    between, program = on.seconds(turn, x)
    before = counts(program.as_text()).operators
    found, program = on.seconds(lambda x: turn(_norms(x)), x)
    per_operator = per_core / (counts(program.as_text()).operators - before)
    costs.put("operator_s", count, max(found - between, _LEAST_S) * per_operator)
    found, _ = on.seconds(lambda x, w: turn(_products(x, w)), x, others)
    costs.put("kernel_s", count, max(found - between, _LEAST_S) / _REPEATS * per_core)
    if count > 1:
        costs.put("exchange_s", count, between)
        small, _ = on.seconds(_ragged(count), np.ones((count, _WIDTH), np.float32))
        costs.put("ragged_s", count, small)
        many = 16
        large, _ = on.seconds(_ragged(count), np.ones((count * many, _WIDTH), np.float32))
        moved = count * count * (many - 1) * _WIDTH * 4
        costs.put("sent_bytes_per_s", count, moved / max(large - small, _LEAST_S))
    costs.put("launch_s", count, _launch(on))


_REPEATS = 24


def _by_mean_square(x: jax.Array) -> jax.Array:
    """A norm by XLA's operators: that of the layers is a kernel."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _norms(x: jax.Array) -> jax.Array:
    """A row of operators that XLA keeps apart, as between the products of a layer."""
    for _ in range(_REPEATS):
        left, right = jnp.split(x, 2, axis=-1)
        x = _by_mean_square(jnp.concatenate([right, -left], axis=-1) * jnp.cos(x))
    return x


def _normalized(x: jax.Array) -> jax.Array:
    """What stands between two products."""
    for _ in range(4):
        left, right = jnp.split(x, 2, axis=-1)
        x = _by_mean_square(jnp.concatenate([right, -left], axis=-1)) + x
    return x


def _softmax(x: jax.Array) -> jax.Array:
    for _ in range(4):
        x = jnp.where(x > 0, jnp.exp(x - x.max(-1, keepdims=True)), x)
    return x


def _products(x: jax.Array, weight: jax.Array) -> jax.Array:
    for _ in range(_REPEATS):
        x = linear(x, weight)
    return x


def _in_turns(count: int) -> Body:
    """An exchange of next to nothing, which every device waits in; alone there is nobody to wait for."""
    if count == 1:
        return lambda x: x

    def turn(x: jax.Array) -> jax.Array:
        sent = jnp.broadcast_to(x[:1, :1], (count, 1))
        return x + fabric.all_to_all(sent, EP_AXIS, 0, 0)[0, 0] * 1e-9

    return turn


def _ragged(count: int) -> Body:
    """An exchange of equally many rows with each device."""

    def exchange(x: jax.Array) -> jax.Array:
        each = x.shape[0] // count
        sizes = jnp.full(count, each, jnp.int32)
        offsets = jnp.arange(count, dtype=jnp.int32) * each
        there = jnp.full(count, each, jnp.int32) * lax.axis_index(EP_AXIS).astype(jnp.int32)
        buffer = fabric.empty(x.shape, x.dtype)
        return fabric.ragged_all_to_all(x, buffer, offsets, sizes, there, sizes, axis_name=EP_AXIS)

    return exchange


def _launch(on: _Devices) -> float:
    """Of a program with as many arrays as a step has, which leaves them alone."""
    arrays = [on.put(np.ones((1, 8), np.float32)) for _ in range(_LAUNCH_ARGUMENTS)]
    fn = on.jit(lambda _, x, *others: x + sum(one[0, 0] for one in others), len(arrays) - 1)
    compiled = fn.lower(np.int32(0), *arrays).compile()
    found = []
    for _ in range(2 * _ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(np.int32(0), *arrays))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _rates(on: _Devices, costs: HostCosts) -> None:
    """Of arithmetic and memory, by one device that has the machine, or by a crowd; of the whole machine."""
    count, rng = on.count, np.random.default_rng(0)
    launch = costs.at("kernel_s", count) * costs.turns(count)  # of each, all devices together
    for dtype in (jnp.bfloat16, jnp.float32):
        name, square = jnp.dtype(dtype).name, (rng.standard_normal((_LARGE, _LARGE)) / _LARGE**0.5).astype(dtype)
        for rows in PRODUCT_ROWS:
            found, _ = on.seconds(linear, np.ones((rows, _LARGE), dtype), square)
            flops = count * 2 * rows * _LARGE**2
            costs.put(f"product_{name}_{rows}", count, flops / max(found - launch, found / 4))
    cold = np.zeros((16 if count > 1 else 64, 1024, 1024), jnp.bfloat16)
    found, _ = on.seconds(_all_layers, np.ones((1, 1024), jnp.bfloat16), cold)
    costs.put("memory_bytes_per_s", count, count * cold.nbytes / found)
    wide = np.ones((_LARGE, _LARGE), np.float32)
    # The same counts that price a step, so that what they leave out is in the rates.
    found, program = on.seconds(_normalized, wide.astype(jnp.bfloat16))
    counted = counts(program.as_text())
    overhead = counted.operators * costs.at("operator_s", count) * costs.turns(count)
    costs.put("elementwise_bytes_per_s", count, count * counted.touched / max(found - overhead, found / 4))
    found, program = on.seconds(_softmax, wide)
    counted = counts(program.as_text())
    plain = counted.operators * costs.at("operator_s", count) * costs.turns(count)
    plain += count * counted.touched / costs.at("elementwise_bytes_per_s", count)
    costs.put("bent_elements_per_s", count, count * counted.bent / max(found - plain, found / 8))
    drawn = rng.standard_normal((64, 256)).astype(np.float32)
    # Values that differ each time, so that no turn finds them in order.
    found, _ = on.seconds(lambda x: jnp.sin(x * 97) + lax.top_k(x, 8)[0][:, :1], drawn)
    costs.put("top_k_elements_per_s", count, count * 64 * 256 / found)
    found, _ = on.seconds(lambda x: jnp.sort(x * 31 % 977), rng.integers(0, 977, 4096).astype(np.int32))
    costs.put("compare_s", count, found / (count * 4096 * 12))
    found, _ = on.seconds(lambda x, w: jnp.einsum("hqd,hdk->hqk", x, w), *(np.ones((8, 128, 128), np.float32),) * 2)
    costs.put("dot_ops_per_s", count, count * 2 * 8 * 128**3 / found)
    _attention(on, costs, launch)
    narrow = np.eye(_WIDTH, dtype=jnp.bfloat16)
    found, _ = on.seconds(linear, np.ones((_LARGE, _WIDTH), jnp.bfloat16), narrow)
    arithmetic = count * 2 * _LARGE * narrow.size / costs.product_rate("bfloat16", _LARGE, count)
    through = max(found - launch - arithmetic, found / 4)
    costs.put("value_s", count, through / (count * 2 * _LARGE * _WIDTH))
    _grouped(on, costs, launch)


def _grouped(on: _Devices, costs: HostCosts, launch: float) -> None:
    """Experts of one row each, and of many: what one costs, and what a value of a row does."""
    count, each, moved = on.count, 3 * _HIDDEN * _FFN, 2 * _HIDDEN + 3 * _FFN
    for rows in (1, 32):
        x = np.ones((_EXPERTS * rows, _HIDDEN), jnp.bfloat16)
        found, _ = on.seconds(_one_layer_of_experts, x, *_experts(rows))
        arithmetic = count * _EXPERTS * 2 * rows * each / costs.product_rate("bfloat16", rows, count)
        left = max(found - launch - arithmetic, found / 8)
        if rows == 1:
            costs.put("expert_s", count, left / _EXPERTS / costs.turns(count))
        else:
            left -= _EXPERTS * costs.at("expert_s", count) * costs.turns(count)
            costs.put("expert_value_s", count, max(left, 0.0) / (count * _EXPERTS * rows * moved))


def _all_layers(x: jax.Array, stack: jax.Array) -> jax.Array:
    """Weights that are in no cache."""
    return lax.fori_loop(0, stack.shape[0], lambda i, x: linear(x, matrix_at(stack, i)), x)


def _attention(on: _Devices, costs: HostCosts, launch: float) -> None:
    """Absorbed attention, of few and narrow and of many and wide queries: a key's cost, and a multiply-add's."""
    requests, keys, block = 8, 256, 16
    found = []
    for rows, width in ((4, 32), (32, 256)):
        cache = np.ones((1, requests * keys, width), jnp.bfloat16)
        table = np.arange(requests * keys // block, dtype=np.int32).reshape(requests, -1)
        body = functools.partial(_attend, config=_config(rows, width), block=block)
        query = np.ones((requests, rows, width), jnp.bfloat16)
        seconds, _ = on.seconds(body, query, cache, table, np.full(requests, keys, np.int32))
        found.append((max(seconds - launch, seconds / 4) / (on.count * requests * keys), rows * width))
    (few_s, few), (many_s, many) = found
    each = max((many_s - few_s) / (many - few), 1e-15)
    costs.put("attended_s", on.count, each)
    costs.put("key_s", on.count, max(few_s - each * few, 1e-12))


def _config(heads: int, width: int) -> ModelConfig:
    """As far as attention asks."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=heads, q_lora_rank=None, kv_lora_rank=width - 8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, moe_intermediate_size=8, num_routed_experts=0, num_shared_experts=0, num_topk=0,
        num_expert_groups=1, num_topk_groups=1, routed_scaling_factor=1.0, first_k_dense_replace=1,
        max_position_embeddings=1024,
    )  # fmt: skip


def _attend(
    query: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array, *, config: ModelConfig, block: int
) -> jax.Array:
    state = Softmax.start(query.shape[:2], query.shape[2])
    keys = PagedKeys(cache, 0, table, block, query.shape[2])
    done = absorbed_part(config, CoreAttention(query, state, query.shape[0]), keys, lengths)
    return query + done.state.mixed.astype(query.dtype) * 1e-9


def _experts(rows_each: int) -> tuple[np.ndarray, ...]:
    counts = np.full(_EXPERTS, rows_each, np.int32)
    w13 = np.full((1, _EXPERTS, 2 * _FFN, _HIDDEN), 1 / _HIDDEN, jnp.bfloat16)
    return counts, w13, np.full((1, _EXPERTS, _HIDDEN, _FFN), 1 / _FFN, jnp.bfloat16)


def _one_layer_of_experts(x: jax.Array, counts: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    received = ReceivedRows(x, counts, None)
    return expert_ffn(
        received, MlpParams(w13, w2), 0, rows_per_block=1, expected_rows=x.shape[0], dtype=jnp.dtype(x.dtype)
    )
