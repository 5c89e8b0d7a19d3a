"""Parameters on a mesh: experts by physical slot, everything else replicated."""

import dataclasses
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cmjax.mesh import use_huge_pages
from cmjax.model.config import ModelConfig
from cmjax.model.params import LayerParams, MoeParams, Params, expert_kind, leaf_name, split_experts
from cmjax.moe import ExpertPlacement, MlpParams, WireDtype
from cmjax.quant import Matrix, QuantArray, split_inputs


def placed_layer_names(config: ModelConfig) -> list[str]:
    """The MoE layers a placement covers: the model's by number, then "mtp" for the MTP module's."""
    mtp_is_moe = config.num_mtp_layers and config.is_moe_layer(config.num_hidden_layers)
    return [*map(str, config.moe_layer_ids), *(["mtp"] if mtp_is_moe else [])]


def plan_placement(config: ModelConfig, ep_size: int, **counts: int | None) -> ExpertPlacement | None:
    """Place a model's experts on `ep_size` ranks, None without any; `counts`: see `ExpertPlacement.plan`."""
    num_layers = len(placed_layer_names(config))
    if not num_layers:
        return None
    return ExpertPlacement.plan(
        num_routed_experts=config.num_routed_experts,
        num_shared_experts=config.num_shared_experts,
        ep_size=ep_size,
        num_layers=num_layers,
        **counts,
    )


def default_wires(params: Params) -> tuple[WireDtype | None, WireDtype | None]:
    """How rows of a model travel where nothing else is asked for: `(dispatch, combine)`, None as they are.

    Those of quantized experts are quantized before they are sent (early quantization) and come back as bfloat16.
    """
    layers = [params.moe, None if params.mtp is None else params.mtp.layer]
    sparse = [layer.mlp for layer in layers if layer is not None and isinstance(layer.mlp, MoeParams)]
    if not any(isinstance(mlp.experts.w13, QuantArray) for mlp in sparse):
        return None, None
    return "int8", None if np.dtype(params.embed.dtype) == np.float16 else "bfloat16"


def param_specs(params: Params, axis_name: str) -> Params[PartitionSpec]:
    """The tree of `PartitionSpec`s of placed params: experts cut by slot, the rest replicated."""

    def spec(path: tuple, _: object) -> PartitionSpec:
        is_routed = expert_kind(leaf_name(path)) == "routed"
        return PartitionSpec(None, axis_name) if is_routed else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, params)


def _split_shared(shared: MlpParams, num_shared: int) -> tuple[Matrix, Matrix]:
    """Cut the shared MLP, `w13[L, 2nf, H]` and `w2[L, H, nf]`, into n experts: `[L, n, 2f, H]` and `[L, n, H, f]`."""

    def split_w13(leaf: np.ndarray) -> np.ndarray:  # [L, 2nf, ...]
        layers, _, *rest = leaf.shape
        parts = np.asarray(leaf).reshape(layers, 2, num_shared, -1, *rest)
        return np.moveaxis(parts, 2, 1).reshape(layers, num_shared, -1, *rest)

    return jax.tree.map(split_w13, shared.w13), split_inputs(shared.w2, num_shared)


def _place_experts(
    routed: np.ndarray, shared: np.ndarray | None, logical_of_slot: np.ndarray, sharding: NamedSharding
) -> jax.Array:
    """Lay experts `[L, E, ...]` (then the shared ones, `[L, n, ...]`) out by slot, each device's part on its own."""
    num_layers, num_routed = routed.shape[:2]
    if shared is None and np.array_equal(logical_of_slot, np.tile(np.arange(num_routed), (num_layers, 1))):
        return jax.device_put(routed, sharding)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # the array has axes
        logical = logical_of_slot[:, index[1]]
        out = np.empty((*logical.shape, *routed.shape[2:]), routed.dtype)
        for layer, row in enumerate(logical):
            for slot, expert in enumerate(row):
                if shared is None or expert < num_routed:
                    out[layer, slot] = routed[layer, expert]
                else:
                    out[layer, slot] = shared[layer, expert - num_routed]
        return out

    return jax.make_array_from_callback((*logical_of_slot.shape, *routed.shape[2:]), sharding, part)


def _place_layers(
    layers: LayerParams, logical_of_slot: np.ndarray, placement: ExpertPlacement | None, mesh: Mesh
) -> LayerParams:
    replicated = NamedSharding(mesh, PartitionSpec())
    mlp = layers.mlp
    if not isinstance(mlp, MoeParams):
        return jax.device_put(layers, replicated)
    shared: tuple[Matrix | None, Matrix | None] = (None, None)
    assert placement is not None  # there are experts
    if mlp.shared is not None and placement.num_shared_replicas:
        shared = _split_shared(mlp.shared, placement.num_shared_experts)
        mlp = dataclasses.replace(mlp, shared=None)
    by_slot = NamedSharding(mesh, PartitionSpec(None, *mesh.axis_names))

    def place(routed: Matrix, shared: Matrix | None) -> Matrix:
        """Values and scales of quantized experts go the same way."""

        def leaf(routed: np.ndarray, shared: np.ndarray | None = None) -> jax.Array:
            return _place_experts(np.asarray(routed), shared, logical_of_slot, by_slot)

        return jax.tree.map(leaf, routed) if shared is None else jax.tree.map(leaf, routed, shared)

    experts = MlpParams(w13=place(mlp.experts.w13, shared[0]), w2=place(mlp.experts.w2, shared[1]))
    rest, _ = split_experts(dataclasses.replace(layers, mlp=mlp))
    placed = jax.device_put(rest, replicated)
    return dataclasses.replace(placed, mlp=dataclasses.replace(placed.mlp, experts=experts))


def abstract_placed_params(
    params: Params[jax.ShapeDtypeStruct], placement: ExpertPlacement | None, mesh: Mesh | AbstractMesh
) -> Params[jax.ShapeDtypeStruct]:
    """What `place_params` makes of a model's params, as shapes with shardings; `params` are shapes too."""

    def place(layers: LayerParams | None) -> LayerParams | None:
        if layers is None or not isinstance(layers.mlp, MoeParams):
            return layers
        assert placement is not None  # there are experts
        slots, mlp = placement.num_physical_experts, layers.mlp
        experts = jax.tree.map(lambda a: a.update(shape=(a.shape[0], slots, *a.shape[2:])), mlp.experts)
        nothing: Any = None
        shared = nothing if placement.num_shared_replicas else mlp.shared
        return dataclasses.replace(layers, mlp=dataclasses.replace(mlp, experts=experts, shared=shared))

    mtp = params.mtp
    if mtp is not None:
        mtp = dataclasses.replace(mtp, layer=cast(LayerParams, place(mtp.layer)))
    placed = dataclasses.replace(params, moe=place(params.moe), mtp=mtp)
    specs = param_specs(placed, *mesh.axis_names)
    return jax.tree.map(lambda a, spec: a.update(sharding=NamedSharding(mesh, spec)), placed, specs)


def place_params(params: Params, placement: ExpertPlacement | None, mesh: Mesh) -> Params:
    """Put a model's params, experts by logical id, on a one-axis mesh, experts by slot.

    On CPU devices a replicated array shares the host's buffer; an instance costs only its redundant copies.
    """
    maps = np.zeros((0, 0), np.int32) if placement is None else placement.physical_to_logical
    num_moe = 0 if params.moe is None else params.moe.input_norm.shape[0]
    layers = {
        "dense": params.dense and _place_layers(params.dense, maps, placement, mesh),
        "moe": params.moe and _place_layers(params.moe, maps[:num_moe], placement, mesh),
    }
    mtp, nothing = params.mtp, cast(Any, None)
    rest = dataclasses.replace(
        params, dense=None, moe=None, mtp=None if mtp is None else dataclasses.replace(mtp, layer=nothing)
    )
    placed = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
    if mtp is not None:
        layer = _place_layers(mtp.layer, maps[num_moe:], placement, mesh)
        layers["mtp"] = dataclasses.replace(placed.mtp, layer=layer)
    placed = dataclasses.replace(placed, **layers)
    use_huge_pages(placed)
    return placed
