"""What is read from a compiled program's text."""

import pytest

from cmjax.targets.hlo import COLLECTIVES, CollectiveUse, Program, shape_bytes

# The lines of such texts are as long as they are.
# ruff: noqa: E501
TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %inside = bf16[8,16]{1,0} copy(%p), backend_config={"estimated_cycles":"999"}
}

%inner (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %f = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %unknown = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%x, %f)
}

%never (arg.2: (s32[], bf16[8,16])) -> pred[] {
  ROOT %c = pred[] constant(false)
}

%outer (arg.3: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg.3 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %y = bf16[8,16]{1,0} get-tuple-element(%arg.3), index=1
  %rows = s8[40,16]{1,0} get-tuple-element(%arg.3), index=2
  %a2a = bf16[8,16]{1,0} all-to-all(%y), channel_id=1, metadata={op_name="jit(step)/loop_3/while/body/dispatch/all_to_all"}
  %start = ((bf16[8,16]{1,0}, s8[40,16]{1,0}), bf16[8,16]{1,0}) ragged-all-to-all-start(%y, %rows), channel_id=2
  %done = bf16[8,16]{1,0} ragged-all-to-all-done(%start)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%arg.3), condition=%never, body=%inner, metadata={op_name="jit(step)/loop_3/while/body/attention/loop_5/while" stack_frame_id=4}
  ROOT %t.2 = (s32[], bf16[8,16]{1,0}) tuple(%y, %done)
}

%branch (q: bf16[8,16]) -> bf16[8,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %ar = bf16[8,16]{1,0} all-reduce(%q), to_apply=%fused
}

ENTRY %main (in: bf16[8,16]) -> bf16[8,16] {
  %in = bf16[8,16]{1,0} parameter(0)
  %big = f32[1000]{0} copy(%other), metadata={op_name="params.q_b"}
  %while.2 = (s32[], bf16[8,16]{1,0}) while(%in), condition=%never, body=%outer, metadata={op_name="jit(step)/loop_3/while" stack_frame_id=9}
  %while.3 = (s32[], bf16[8,16]{1,0}) while(%in), condition=%never, body=%inner, backend_config={"known_trip_count":{"n":"7"}}
  %while.4 = (s32[], bf16[8,16]{1,0}) while(%in), condition=%never, body=%inner, metadata={op_name="jit(step)/loop_3/sort/while"}
  ROOT %cond = bf16[8,16]{1,0} conditional(%in, %in), branch_computations={%branch, %never}
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    assert Program(TEXT).collectives() == {
        "all-reduce": CollectiveUse(1, 256),
        "all-to-all": CollectiveUse(3, 3 * 256),
        "ragged-all-to-all": CollectiveUse(3, 3 * 256),  # its rows, not the buffer that receives
    }


def test_cycles_count_by_known_trips_by_scope_and_once_where_nobody_knows():
    # The inner loop runs 3 * 5 times in the outer one, 7 by what the compiler knows, once without a scope of its own;
    # its fusion that has no estimate counts nothing, and neither does what is inside a fusion.
    assert Program(TEXT).estimated_cycles() == 10 * (15 + 7 + 1)


def test_a_program_without_estimates_has_none():
    assert Program(TEXT.replace("estimated_cycles", "something")).estimated_cycles() is None


def test_the_largest_copies_come_first():
    assert Program(TEXT).copies(5) == [(4000, "f32[1000]", "params.q_b")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[8,7168]{1,0:T(8,128)(2,1)}", 8 * 7168 * 2),
        ("(s8[3]{0}, f32[2,2]{1,0}, u32[]{:S(2)})", 3 + 16 + 4),
        ("s4[9]", 5),
        ("pred[]", 1),
        ("token[]", 0),
        ("f8e4m3fn[10]", 10),
    ],
)
def test_bytes_of_a_shape(text, expected):
    assert shape_bytes(text) == expected


def test_every_kind_of_collective_has_a_name_of_its_own():
    assert len(set(COLLECTIVES)) == len(COLLECTIVES)
