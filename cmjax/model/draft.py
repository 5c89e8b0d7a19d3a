"""The MTP module in decode: what it makes of tokens that the model has settled, or of its own guesses."""

import jax

from cmjax.model.params import Params
from cmjax.model.transformer import DecodeBatch, PassOutput, RankSpec, decode_context, mtp_pass, stack_loads


def draft_pass(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: DecodeBatch,
    hidden: jax.Array,
    spec: RankSpec,
    *,
    channel: str = "draft",
) -> PassOutput:
    """The MTP module's hidden states, which predict the token after next (paper section 4.2.4).

    Args:
        params: with an MTP module.
        expert_to_slot, cache, spec: as for `decode_pass`.
        batch: `token_ids` are those after the positions.
        hidden: `[tokens, hidden]` at the positions, the model's or, for a further guess, the module's own.
        channel: names the exchanges; passes of one step need different ones.
    """
    assert params.mtp is not None  # checked by the caller
    context = decode_context(expert_to_slot, batch, spec, channel)
    hidden, cache, loads = mtp_pass(params, params.mtp, hidden, batch.token_ids, cache, context)
    return PassOutput(hidden, cache, stack_loads(loads))
