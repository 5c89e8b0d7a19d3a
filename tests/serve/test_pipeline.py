"""Two microbatches in decode: the plain step's tokens and logits, on any number of devices."""

import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.model import token_order
from cmjax.moe import FabricExchange
from cmjax.schedule import Autotune
from cmjax.serve import SamplingParams
from tests.helpers import max_error, tiny_model
from tests.parity import load_case
from tests.serve.driving import make_engine, model_of, step_through


@pytest.mark.parametrize(
    ("name", "ep_size", "places"),
    [("v3-mtp", 1, 4), ("v2-lite", 8, 2), ("v3-ep320", 320, 2), ("v3-dense", 4, 2)],
)
def test_logits_are_the_references(name, ep_size, places):
    """Half of the places empty, or in either half; layers with experts and without; shared ones dispatched or not."""
    case = load_case(name)
    engine = make_engine(model_of(case), ep_size, max_num_seqs_per_rank=places, microbatches=2)
    ids = case.input_ids[:, :20]
    assert max_error(step_through(engine, ids, 12), case.logits[:, :20]) < 2e-4


def test_the_plain_steps_tokens(rng):
    """Also int8 rows on the wire, drafts and sampling; the load of the experts is the same. Prefill's own form: prompts
    cut anywhere, chunks, drafts' latents, prompt logprobs in order."""
    model = tiny_model(num_nextn_predict_layers=1)
    prompts = [rng.integers(0, 101, length).tolist() for length in (3, 40, 17, 1, 29, 12, 2, 5, 30)]
    asked = [SamplingParams(max_tokens=9 + i, temperature=0.8 * (i % 2), seed=i, prompt_logprobs=1) for i in range(9)]
    common = {"max_num_seqs_per_rank": 4, "num_speculative_tokens": 1, "dispatch_dtype": "int8"}
    common |= {"prefill_ep_size": 4, "max_num_batched_tokens": 32}
    plain, two = (make_engine(model, 4, microbatches=count, **common).generate(prompts, asked) for count in (1, 2))
    np.testing.assert_array_equal(plain.decode_load, two.decode_load)
    for one, other in zip(plain.outputs, two.outputs, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    np.testing.assert_array_equal(plain.prefill_load, two.prefill_load)


def test_token_order():
    """Two microbatches of 3 ranks with 2 tokens each: rank 0 has tokens 0, 1 and 6, 7."""
    np.testing.assert_array_equal(np.argsort(token_order(12, 3, 2)), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])
    np.testing.assert_array_equal(token_order(12, 3, 1), range(12))


def test_auto_stays_with_the_faster():
    """Each form is tried in turn; what is slower is left after a few calls."""
    autotune = Autotune([1, 2])
    for call in range(20):
        form = autotune.choice
        assert (form == 1 + call % 2) if call < 8 else (form == 2)
        autotune.add(form, {1: 3.0, 2: 1.0 if call else 99.0}[form])
    assert Autotune([1]).choice == 1
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, 4, max_num_seqs_per_rank=2, microbatches="auto", steps_per_call=1)
    plain = make_engine(model, 4, max_num_seqs_per_rank=2, steps_per_call=1)  # compiled as a form of `auto`
    prompts, sampling = [[1, 2], [3], [4, 5, 6]], SamplingParams(max_tokens=12)
    found, wanted = (one.generate(prompts, sampling).outputs for one in (engine, plain))
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    (planner,) = engine.core.scheduler.decode.values()
    assert all(len(taken) == planner.autotune.ROUNDS for taken in planner.autotune._seconds.values())
    # A half of an odd number of places there is not.
    assert list(make_engine(model, 4, max_num_seqs_per_rank=3, microbatches="auto").decode.specs) == [1]


def test_bad_settings():
    model = tiny_model(num_hidden_layers=2)
    with pytest.raises(UserError, match="microbatches 2 do not divide max_num_seqs_per_rank 3"):
        make_engine(model, 1, max_num_seqs_per_rank=3, microbatches=2)
    with pytest.raises(UserError, match="microbatches 3 are not supported; supported: 1, 2, auto"):
        make_engine(model, 1, max_num_seqs_per_rank=3, microbatches=3)

    class Whole:
        def __init__(self, **options):
            self.plain = FabricExchange(**options)

        def dispatch(self, *args, **kwargs):
            return self.plain.dispatch(*args, **kwargs)

        def combine(self, *args, **kwargs):
            return self.plain.combine(*args, **kwargs)

    with pytest.raises(UserError, match=r"Whole has no dispatch_start, .* microbatches must be 1"):
        make_engine(model, 1, max_num_seqs_per_rank=2, microbatches=2, exchange=Whole)
