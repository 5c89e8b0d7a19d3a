"""What becomes of fields that the API does not have: those that change nothing are ignored, those that would change the
answer are refused where they ask for something, and those that nobody knows are ignored and named in the log."""

import logging
from collections.abc import Mapping

from cmjax.api.errors import ApiError

logger = logging.getLogger(__name__)

# They say who asks, what a provider keeps, or how fast it should be; never what the answer is.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prediction", "cache_prompt", "parallel_tool_calls", "extra_headers", "extra_query",
        # Of no effect without what they are about, which is refused; or none with tokenizers of this kind.
        "guided_decoding_backend", "guided_whitespace_pattern", "spaces_between_special_tokens", "mm_processor_kwargs",
    }
)  # fmt: skip
# Field -> values that ask for nothing, beside null, false and what is empty.
REFUSED: Mapping[str, tuple[object, ...]] = {
    # The form of the answer.
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_json_object": (),
    "structured_outputs": (), "structural_tag": (), "response_format": ({"type": "text"},), "grammar": (), "regex": (),
    "ebnf": (), "json_schema": (), "verbosity": ("medium",), "return_tokens_as_token_ids": (),
    # How it is searched and sampled.
    "use_beam_search": (), "best_of": (1,), "num_beams": (1,), "beam_width": (1,), "length_penalty": (1,),
    "early_stopping": (), "logits_processors": (), "custom_logit_processor": (), "vllm_xargs": (), "typical_p": (1,),
    "top_a": (), "tfs": (1,), "epsilon_cutoff": (), "eta_cutoff": (), "mirostat": (), "mirostat_mode": (),
    "dynatemp_range": (), "xtc_probability": (), "dry_multiplier": (), "no_repeat_ngram_size": (),
    "encoder_repetition_penalty": (1,), "penalty_alpha": (), "smoothing_factor": (), "guidance_scale": (1,),
    "logprob_token_ids": (), "thinking_token_budget": (),
    # Where it ends, under other servers' names.
    "max_new_tokens": (), "min_new_tokens": (), "n_predict": (-1,), "stop_regex": (), "bad_words_ids": (),
    # What it is an answer to.
    "suffix": (), "prompt_embeds": (), "chat_template": (), "documents": (), "functions": (),
    "function_call": ("none",), "reasoning_effort": (), "include_reasoning": (True,), "thinking": (), "reasoning": (),
    "web_search_options": (), "audio": (), "modalities": (["text"],), "images": (), "input_audio": (), "lora_path": (),
    "adapter_id": (), "kv_transfer_params": (), "multi_modal_data": (),
}  # fmt: skip
# Arguments of a template's name that are none: what Hugging Face's `apply_chat_template` does with its result.
_NO_ARGUMENTS = (
    "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_MOST_NAMED = 100
_named: set[str] = set()


def check_fields(more: Mapping[str, object] | None, num_choices: int = 1) -> None:
    """400 for the first of the fields in `more` that asks for what cannot be had."""
    for name, value in (more or {}).items():
        if name in REFUSED:
            neutral = (*REFUSED[name], num_choices) if name == "best_of" else REFUSED[name]
            # True equals 1, which some of them may be.
            is_neutral = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
            if name == "include_reasoning":
                is_neutral |= value is None
            elif not is_neutral:
                is_neutral = _is_nothing(value)
            if not is_neutral:
                raise ApiError(400, f"{name}: not supported", param=name)
        elif name not in IGNORED and name not in _named and len(_named) < _MOST_NAMED:
            _named.add(name)
            logger.warning("requests have a field %r, which is unknown and ignored", name[:80])


def check_template_arguments(variables: Mapping[str, object] | None) -> None:
    """400 for arguments that no template gets."""
    for name in variables or {}:
        if name in _NO_ARGUMENTS:
            message = f"chat_template_kwargs: {name!r} is no argument of a template, and not supported"
            raise ApiError(400, message, param="chat_template_kwargs")


def _is_nothing(value: object) -> bool:
    return (
        value is None
        or value is False
        or value == ""
        or value == []
        or value == {}
        or (isinstance(value, int | float) and not isinstance(value, bool) and value == 0)
    )
