"""Params on a mesh: each device holds exactly its slots' experts, the shared ones included."""

import jax
import numpy as np
import pytest

from cmjax.model import Model, init_params, param_specs, place_params, plan_placement, reference
from cmjax.model.params import convert_params
from cmjax.quant import InputMajor
from tests.helpers import tiny_config


def of_rank(leaf, device):
    return next(np.asarray(shard.data) for shard in leaf.addressable_shards if shard.device == device)


@pytest.mark.parametrize(
    ("ep_size", "counts"),
    [(1, {}), (5, {}), (8, {}), (8, {"num_shared_replicas": 4, "num_redundant_experts": 4}), (40, {})],
)
def test_each_device_holds_the_experts_of_its_slots(make_mesh, rng, ep_size, counts):
    config = tiny_config(n_shared_experts=2, num_nextn_predict_layers=1)
    params, mesh = init_params(config), make_mesh(ep_size)
    placement = plan_placement(config, ep_size, **counts)
    placed = place_params(params, placement, mesh)
    num_moe, num_local = len(config.moe_layer_ids), placement.num_local_experts
    assert placement.physical_to_logical.shape[0] == num_moe + 1
    x = rng.normal(size=(3, config.hidden_size))
    ffn = config.moe_intermediate_size
    for stack, at_slots, maps in (
        (params.moe.mlp, placed.moe.mlp, placement.physical_to_logical[:num_moe]),
        (params.mtp.layer.mlp, placed.mtp.layer.mlp, placement.physical_to_logical[num_moe:]),
    ):
        for rank, device in enumerate(mesh.devices):
            w13, w2 = of_rank(at_slots.experts.w13, device), of_rank(at_slots.experts.w2, device)
            assert w13.shape[:2] == w2.shape[:2] == (len(maps), num_local)
            for layer, held in enumerate(maps[:, rank * num_local : (rank + 1) * num_local]):
                for slot, expert in enumerate(held):
                    if expert < 24:
                        np.testing.assert_array_equal(w13[layer, slot], stack.experts.w13[layer, expert])
                        np.testing.assert_array_equal(w2[layer, slot], stack.experts.w2[layer, expert])
                    else:
                        part = slice((expert - 24) * ffn, (expert - 23) * ffn)
                        gate, up = np.split(stack.shared.w13[layer], 2)
                        np.testing.assert_array_equal(w13[layer, slot], np.concatenate([gate[part], up[part]]))
                        np.testing.assert_array_equal(w2[layer, slot], stack.shared.w2[layer][:, part])
        # The parts of the shared MLP add up to the whole.
        if placement.num_shared_replicas:
            assert at_slots.shared is None
            slots = [int(np.flatnonzero(maps[0] == expert)[0]) for expert in (24, 25)]
            experts = [np.asarray(w)[0] for w in (at_slots.experts.w13, at_slots.experts.w2)]
            total = sum(reference.mlp(x, experts[0][slot], experts[1][slot]) for slot in slots)
            np.testing.assert_allclose(total, reference.mlp(x, stack.shared.w13[0], stack.shared.w2[0]), rtol=1e-5)
        else:
            np.testing.assert_array_equal(at_slots.shared.w13, stack.shared.w13)


def test_everything_else_is_replicated_and_specs_say_so(make_mesh):
    config, mesh = tiny_config(num_nextn_predict_layers=1), make_mesh(8)
    params = init_params(config)
    placed = place_params(params, plan_placement(config, 8), mesh)
    specs = param_specs(placed, "ep")
    assert jax.tree.structure(placed) == jax.tree.structure(specs)
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(specs), strict=True):
        is_expert = ".experts." in jax.tree_util.keystr(path)
        assert leaf.sharding.spec == spec
        assert leaf.is_fully_replicated != is_expert
    np.testing.assert_array_equal(placed.embed, params.embed)
    np.testing.assert_array_equal(placed.moe.attn.kv_b, params.moe.attn.kv_b)
    np.testing.assert_array_equal(placed.dense.mlp.w13, params.dense.mlp.w13)


def test_a_model_without_experts_needs_no_placement(make_mesh):
    config = tiny_config(first_k_dense_replace=9)
    assert plan_placement(config, 8) is None
    placed = place_params(init_params(config), None, make_mesh(8))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("config", [tiny_config(num_nextn_predict_layers=1), tiny_config(tie_word_embeddings=True)])
def test_input_major_params_hold_the_same_matrices(make_mesh, config, quant):
    """Of the float matrices that every rank multiplies by; a device shares the host's buffer of them too."""
    params = convert_params(init_params(config), quant, np.float32)
    model = Model(config, params, "")
    stored = model.input_major_params
    assert model.input_major_params is stored
    floats = {"router", "head"} | (set() if quant else {"q_a", "q_b", "kv_a", "o", "w13", "w2"})
    seen = set()

    def check(path, leaf, like):
        names = [key.name for key in path]
        if not isinstance(leaf, InputMajor):
            assert leaf is like
            return
        seen.add(names[-1])
        assert not {"experts", "shared"} & {*names}
        *lead, inputs = like.shape
        lead = [lead[0], lead[1] * lead[2]] if names[-1] == "q_b" else lead
        np.testing.assert_array_equal(np.swapaxes(leaf.value, -1, -2), like.reshape(*lead, inputs))
        assert leaf.value.flags.c_contiguous
        assert leaf.value.ctypes.data % 64 == 0

    wanted = params if params.head is not None else params.replace(head=params.embed)
    jax.tree_util.tree_map_with_path(check, stored, wanted, is_leaf=lambda leaf: isinstance(leaf, InputMajor))
    assert seen - {"eh_proj"} == floats
    placed = place_params(stored, plan_placement(config, 8), make_mesh(8))
    shards = placed.head.value.addressable_shards
    assert {shard.data.unsafe_buffer_pointer() for shard in shards} == {stored.head.value.ctypes.data}
