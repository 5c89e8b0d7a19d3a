"""Prefill, hand-off and decode against the references, fed their tokens: every position's logits within 5e-4.

The whole matrix, 16 cases at EP 1, 8, 64 and 320, runs with `make soak`: most of its time is compilation. Here the
cases made elsewhere run at one size each, and `v3-ep320` at all of them; `tests/model` holds every case to its
references on one device.
"""

import pytest

from tests.helpers import max_error
from tests.parity import CASES, load_case
from tests.serve.driving import make_engine, model_of, step_through

EP_SIZES = (1, 8, 64, 320)
GIVEN = {
    "v3-small": 8,
    "v3-mtp": 8,
    "v3-fp8": 64,
    "v3-yarn-noqlora": 8,
    "v2-lite": 8,
    "v2-lite-yarn": 64,
}
HERE = {("v3-ep320", ep) for ep in EP_SIZES} | {*GIVEN.items()}
MATRIX = [
    pytest.param(name, ep, marks=() if (name, ep) in HERE else pytest.mark.soak) for name in CASES for ep in EP_SIZES
]


@pytest.mark.parametrize(("name", "ep_size"), MATRIX)
def test_logits_at_every_position(name, ep_size):
    case = load_case(name)
    num_seqs = len(case.input_ids)
    engine = make_engine(model_of(case), ep_size, max_num_seqs_per_rank=-(-num_seqs // ep_size))
    num_prompt = 12 if case.prompt is None else case.prompt.shape[1]
    assert max_error(step_through(engine, case.input_ids, num_prompt), case.logits) < 5e-4
