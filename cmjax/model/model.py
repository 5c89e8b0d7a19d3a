"""A loaded model: config and weights on the host, and its logits on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS, fabric
from cmjax.model.config import ModelConfig
from cmjax.model.params import Params, input_major_params, named_leaves, quant_mode
from cmjax.model.placed import default_wires, param_specs, place_params, plan_placement
from cmjax.model.prefill import PrefillBatch, prefill_pass
from cmjax.model.transformer import RankSpec, lm_head, mtp_head
from cmjax.moe import ExpertPlacement, FabricExchange
from cmjax.quant import QuantMode

_BLOCK_SIZE = 16


def expert_maps(placement: ExpertPlacement | None, ep_size: int) -> np.ndarray:
    """The step's placement argument, `int32[moe layers, ep_size, logical]`; empty without experts."""
    return np.zeros((0, ep_size, 0), np.int32) if placement is None else placement.expert_to_slot


@functools.partial(jax.jit, static_argnames=("spec", "mesh", "with_mtp"))
def _all_logits(
    params: Params, maps: jax.Array, batch: PrefillBatch, *, spec: RankSpec, mesh: Mesh, with_mtp: bool
) -> jax.Array:
    config = spec.config

    def rank(params: Params, maps: jax.Array, batch: PrefillBatch) -> jax.Array:
        num_slots = batch.block_table.size * spec.block_size
        cache = fabric.empty((config.num_cache_layers, num_slots, config.latent_width), params.embed.dtype)
        if not with_mtp:
            params = dataclasses.replace(params, mtp=None)
        output, mtp_hidden = prefill_pass(params, maps[:, 0], cache, batch, spec)
        return lm_head(params, output.hidden) if mtp_hidden is None else mtp_head(params, mtp_hidden)

    specs = (param_specs(params, EP_AXIS), PartitionSpec(), PartitionSpec())
    return jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(
        params, maps, batch
    )


class Model:
    """A DeepSeek V2, V3 or R1 model.

    Attributes:
        config: its sizes and switches.
        params: host arrays, experts by logical id (`cmjax.model.params`).
        dtype: of the weights and activations.
        digest: hex digest of weights, config and dtype; equal models have equal digests.
    """

    def __init__(self, config: ModelConfig, params: Params, digest: str) -> None:
        self.config = config
        self.params = params
        self.digest = digest

    @property
    def dtype(self) -> np.dtype:
        """dtype of the weights and activations."""
        return np.dtype(self.params.embed.dtype)

    @property
    def quant(self) -> QuantMode | None:
        """How the large matrices are multiplied: "int8", "fake", or None where they are floats."""
        return quant_mode(self.params)

    @property
    def quantized(self) -> frozenset[str]:
        """The leaves in int8, by their place in `params`, such as `moe.attn.o`."""
        suffix = ".qvalue"
        return frozenset(name.removesuffix(suffix) for name in named_leaves(self.params) if name.endswith(suffix))

    @functools.cached_property
    def input_major_params(self) -> Params:
        """`params` as CPU devices multiply few rows by them fastest; what is stored anew is shared by all who ask."""
        return input_major_params(self.params)

    @functools.cached_property
    def _on_one_device(self) -> tuple[Params, np.ndarray, Mesh, RankSpec]:
        mesh = Mesh(np.array(jax.devices()[:1]), (EP_AXIS,))
        placement = plan_placement(self.config, 1)
        dispatch_dtype, combine_dtype = default_wires(self.params)
        exchange = FabricExchange(
            axis_name=EP_AXIS,
            num_local_experts=max(self.config.num_routed_experts, 1),
            dispatch_dtype=dispatch_dtype,
            combine_dtype=combine_dtype,
        )
        spec = RankSpec(config=self.config, axis_name=EP_AXIS, block_size=_BLOCK_SIZE, exchange=exchange)
        return place_params(self.params, placement, mesh), expert_maps(placement, 1), mesh, spec

    def _logits(self, input_ids: ArrayLike, *, with_mtp: bool) -> jax.Array:
        ids = check_token_ids(token_id_array(input_ids, "input_ids"), self.config)
        if ids.ndim != 2 or ids.size == 0:
            raise UserError(f"input_ids has shape {list(ids.shape)}, expected [batch, sequence], neither of them 0")
        params, maps, mesh, spec = self._on_one_device
        logits = _all_logits(params, maps, _whole_sequences(ids), spec=spec, mesh=mesh, with_mtp=with_mtp)
        return logits.reshape(*ids.shape, -1)

    def logits(self, input_ids: ArrayLike) -> jax.Array:
        """Return `float32[B, S, vocabulary]` for `input_ids int[B, S]`: one full forward on one device.

        The engine's own layer code on an axis of size 1.

        Raises:
            UserError: ids outside the vocabulary, or not of two dimensions.
        """
        return self._logits(input_ids, with_mtp=False)

    def mtp_logits(self, input_ids: ArrayLike) -> jax.Array:
        """Return `float32[B, S - 1, vocabulary]`: at t, the MTP module's prediction of token t + 2 from the model's
        hidden state at t and token t + 1.

        Raises:
            UserError: as for `logits`; also for a model without an MTP module, and S below 2.
        """
        if self.params.mtp is None:
            raise UserError("the model has no MTP module (num_nextn_predict_layers)")
        if token_id_array(input_ids, "input_ids").ndim == 2 and np.shape(input_ids)[1] < 2:
            raise UserError("mtp_logits needs sequences of at least 2 tokens")
        return self._logits(input_ids, with_mtp=True)[:, :-1]


def token_id_array(ids: ArrayLike, name: str) -> np.ndarray:
    """Return `ids` as an array, or raise `UserError` naming them: rows of unequal length make none."""
    try:
        return np.asarray(ids)
    except ValueError:
        raise UserError(f"{name}: the lists of token ids differ in length") from None


def check_token_ids(ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the ids as int32, or raise `UserError` naming the first outside the vocabulary."""
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"token ids are {ids.dtype}, expected integers")
    outside = (ids < 0) | (ids >= config.vocab_size)
    if outside.any():
        raise UserError(f"token id {ids[outside][0]} is outside the vocabulary (0 to {config.vocab_size - 1})")
    return ids.astype(np.int32)


def _whole_sequences(ids: np.ndarray) -> PrefillBatch:
    """Pack `int32[B, S]`, each sequence with blocks of its own."""
    batch, length = ids.shape
    blocks = -(-length // _BLOCK_SIZE)
    following = np.concatenate([ids[:, 1:], np.full((batch, 1), -1, np.int32)], axis=1)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    first_slot = np.arange(batch, dtype=np.int32)[:, None] * blocks * _BLOCK_SIZE
    return PrefillBatch(
        token_ids=jnp.asarray(ids.reshape(-1)),
        next_token_ids=jnp.asarray(following.reshape(-1)),
        positions=jnp.asarray(positions.reshape(-1)),
        slot_mapping=jnp.asarray((positions + first_slot).reshape(-1)),
        query_start=jnp.arange(batch + 1, dtype=jnp.int32) * length,
        block_table=jnp.arange(batch * blocks, dtype=jnp.int32).reshape(batch, blocks),
    )
