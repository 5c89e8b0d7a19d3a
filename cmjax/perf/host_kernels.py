"""What a C++ kernel does in a compiled program, counted from the shapes of its operands: see `host_work`."""

import dataclasses
import math
import re
from collections.abc import Mapping

from cmjax.kernels import Tiling, tiling
from cmjax.targets.hlo import Instruction, array_shapes, shape_bytes

Amounts = Mapping[str, float]
_Shapes = list[tuple[str, tuple[int, ...]]]
_Counted = tuple[dict[str, float], float]
_GIVEN = re.compile(r"operand_layout_constraints=\{(.*?)\}, (?:custom_call|output_to|api_version|metadata)")
SCOPE = re.compile(r'op_name="([^"]*)"')
_CHUNKS, _TILES = (
    re.compile(r"core_attention/loop_\d+/while$"),
    re.compile(r"core_attention/loop_\d+/while/.*loop_1/while$"),
)
_ITEM_BYTES = {"bf16": 2, "f32": 4, "s8": 1}
_LANES = 16
_PADDED = 64  # values of a staged row


@dataclasses.dataclass(frozen=True)
class HostData:
    """What the data of a step is expected to be, of a device on average.

    Attributes:
        keys: of a request (decode).
        rows, experts: that the experts receive of one dispatch, and experts that receive any.
        chunks, tiles: trips of prefill's loop over keys, and for each of the loop over queries inside it (XLA's form).
        prompts, prompt_keys, pairs: in prefill, sequences that a device has queries of, the keys that those see, and
            pairs of a query and a key that it sees.
    """

    keys: float = 0
    rows: float = 0
    experts: float = 0
    chunks: float = 0
    tiles: float = 0
    prompts: float = 0
    prompt_keys: float = 0
    pairs: float = 0

    def trips(self, loop: Instruction) -> float | None:
        """Of a loop whose trips the data decides."""
        scope = SCOPE.search(loop.rest)
        if scope is None or not self.chunks:
            return None
        return self.tiles if _TILES.search(scope[1]) else self.chunks if _CHUNKS.search(scope[1]) else None


def operand_shapes(one: Instruction) -> _Shapes:
    """Of a custom call's operands, with their types."""
    given = _GIVEN.search(one.rest)
    return array_shapes(given[1] if given else "")


def kernel_amounts(name: str, one: Instruction, data: HostData) -> tuple[Amounts, float]:
    """Of a C++ kernel, and the bytes of matrices that it reads: what its inner loops run over, in whole vectors."""
    arrays, results = operand_shapes(one), array_shapes(one.shape)
    own, weight_bytes = _KERNELS[name](arrays, results, data)
    return {f"{name}_s": 1.0, **own}, weight_bytes


def _whole(width: float, lanes: int = _LANES) -> float:
    return math.ceil(width / lanes) * lanes


def _norm(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    rows, width = arrays[0][1]
    return {"norm_row_s": rows, "norm_value_s": rows * _whole(width)}, 0.0


def _choose(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    tokens, experts = arrays[0][1]
    shared = arrays[2][1][0] - experts
    taken = results[0][1][1] - shared
    return {"choose_score_s": tokens * experts, "choose_compare_s": tokens * taken * _whole(experts)}, 0.0


def _sample(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    """Of requests that take the best token: what others ask for is not in the shapes."""
    rows, vocabulary = arrays[0][1]
    return {"sample_value_s": rows * _whole(vocabulary)}, 0.0


def _pack(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (given, (tokens, hidden)), (kind, (rows, width)), (_, offsets) = arrays[0], results[0], results[2]
    return {
        "pack_row_s": rows,
        "pack_slot_s": math.prod(offsets),
        "pack_byte_s": rows * shape_bytes(f"{kind}[{width}]"),
        "quantized_s": tokens * _whole(hidden) if kind == "s8" and given != kind else 0.0,
    }, 0.0


def _lay_out(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    ranks, _, local = arrays[0][1]
    return {"lay_out_rank_s": ranks, "lay_out_segment_s": ranks * local}, 0.0


def _absorb(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (_, (tokens, heads, nope)), (_, (_, _, _, latent)) = arrays[0], arrays[2]
    each = nope * _whole(latent)
    return {
        "absorb_row_s": tokens * heads,
        "absorb_weight_s": heads * each,
        "absorb_value_s": tokens * heads * each,
    }, 0.0


def _release(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    kind, (_, heads, _, latent) = next(one for one in arrays if len(one[1]) == 4)
    tokens, values = results[0][1]
    found = _multiplied(tiling(kind), kind, tokens, values / heads, latent, is_many=False)
    found = {name: heads * amount for name, amount in found.items()}
    return {**found, "release_row_s": tokens * heads * _whole(latent), "stored_s": tokens * values}, 0.0


def _attend(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    requests, rows, width = arrays[0][1]
    keys = requests * data.keys
    return {
        "attend_key_s": keys,
        "attend_read_s": keys * _whole(width),
        "attend_score_s": keys * rows,
        "attend_value_s": keys * rows * _whole(width),
    }, 0.0


def _attend_expanded(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    """Of each head and prompt its matrix is made ready, then each key is made by it; pairs that the mask hides go with
    the tiles in which others are seen, and are in the cost of those."""
    (_, (heads, _, width)), (_, (_, _, out, latent)) = arrays[0], arrays[4]
    return {
        "expand_head_s": heads * data.prompts * out * _whole(latent),
        "expand_key_s": heads * data.prompt_keys * out * _whole(latent),
        "expand_score_s": heads * data.pairs,
        "expand_value_s": heads * data.pairs * (_whole(width) + _whole(results[2][1][-1])),
    }, 0.0


def matrix_amounts(kind: str, rows: float, out: float, width: float, given: str | None = None) -> _Counted:
    """Of a product `[rows, width] x [out, width]`, of rows that are `given` as another type than the matrix."""
    how, given = tiling(kind), given or kind
    is_many = rows >= how.many_rows
    amounts = {"stored_s": rows * out, **_multiplied(how, kind, rows, out, width, is_many)}
    if is_many:
        share = min(4 * _whole(width, _PADDED) / how.many_bytes, 1 / how.many_block)  # of a group of rows, each
        amounts[f"laid_{kind}_s"] *= math.ceil(rows * share)
    if is_many or width % how.step or not (how.is_read_in_place and given == kind):
        _add(amounts, _staged(kind, given, rows, width, is_many))
    return amounts, out * width * _ITEM_BYTES[kind]


def _multiplied(how: Tiling, kind: str, rows: float, out: float, width: float, is_many: bool) -> dict[str, float]:
    """Sums: a tile of few rows reads the weights as they are, for many rows columns are laid side by side once."""
    values, tile = out * _whole(width, how.step), how.many_tile if is_many else how.tile_rows
    # At most one tile has fewer rows; of an expectation, which is no whole number, half a one.
    tiles = math.ceil(rows / tile) if rows == int(rows) else max(1.0, rows / tile + 0.5)
    scaled = rows * out if kind == "s8" else 0.0
    if is_many:
        return {f"laid_{kind}_s": values, f"many_{kind}_s": tiles * tile * values, "scaled_s": scaled}
    return {
        f"tile_{kind}_s": tiles * values,
        f"value_{kind}_s": rows * values,
        "summed_s": rows * out,  # a vector of sums each
        "rest_s": tiles * out if width % how.step else 0.0,  # of rows that are no whole steps
        "scaled_s": scaled,
    }


def _staged(kind: str, given: str, rows: float, width: float, is_many: bool) -> dict[str, float]:
    """Rows made what products read."""
    name, values = "quantized_s" if kind == "s8" and given != kind else "staged_s", rows * _whole(width)
    return {name: values, "by_lane_s": values if is_many and kind != "s8" else 0.0}


def _add(amounts: dict[str, float], more: Amounts, times: float = 1.0) -> None:
    for name, amount in more.items():
        amounts[name] = amounts.get(name, 0.0) + times * amount


def _product(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (given, (rows, width)), (kind, (*_, out, _)) = arrays[0], arrays[2]
    return matrix_amounts(kind, rows, out, width, given)


def _experts(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (kind, w13), (_, w2) = [one for one in arrays if len(one[1]) == 4][:2]
    found = {"expert_s": data.experts, "gated_s": data.rows * w2[3], "stored_s": data.rows * w2[2]}
    how, each = tiling(kind), data.rows / max(data.experts, 1e-9)
    is_many = each >= how.many_rows
    for given, (out, width) in ((arrays[0][0], w13[2:]), ("f32", w2[2:])):
        amounts = _multiplied(how, kind, each, out, width, is_many)
        if is_many:
            amounts[f"laid_{kind}_s"] *= math.ceil(each / how.many_block)
        _add(amounts, _staged(kind, given, each, width, is_many))
        _add(found, amounts, data.experts)
    return found, data.experts * (math.prod(w13[2:]) + math.prod(w2[2:])) * _ITEM_BYTES[kind]


_KERNELS = {
    "norm": _norm, "choose": _choose, "pack": _pack, "lay_out": _lay_out, "absorb": _absorb, "attend": _attend,
    "release": _release, "attend_expanded": _attend_expanded, "product": _product, "experts": _experts,
    "sample": _sample,
}  # fmt: skip

LAUNCHED = tuple(f"{name}_s" for name in _KERNELS)
