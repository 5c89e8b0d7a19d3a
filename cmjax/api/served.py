"""What is served, as far as a request can be checked against it."""

import dataclasses
from collections.abc import Mapping

from cmjax.api.errors import ApiError, clipped
from cmjax.api.template import ChatTemplate
from cmjax.text import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """The model as clients see it, and the bounds of what they may ask for.

    Attributes:
        model_name: what clients call it.
        vocab_size: ids are below it.
        max_model_len: most tokens of a request, prompt and answer together.
        max_requests: most prompts times choices of one body.
        min_priority: the most urgent that a client may ask for.
        default_max_tokens: of a chat that does not say, where there is room for them.
        defaults: of sampling, for what a request leaves out; `max_tokens` bounds what does not say it.
        eos_ids: tokens that end a text.
        tokenizer: None: prompts and answers are token ids only.
        template: for conversations; None where the model has none.
    """

    model_name: str
    vocab_size: int
    max_model_len: int
    max_requests: int
    min_priority: int = 0
    default_max_tokens: int
    defaults: Mapping[str, float]
    eos_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    template: ChatTemplate | None

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an error where the model has none."""
        if self.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer.json: give prompts as token ids", param="prompt")
        return self.tokenizer

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name != self.model_name:
            message = f"the model {clipped(name)} is not served here; {self.model_name!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_number(self, num_requests: int) -> None:
        """400 for a body of more prompts times choices than may ever be under way."""
        if num_requests > self.max_requests:
            raise ApiError(
                400,
                f"prompt: {num_requests} prompts times choices, at most {self.max_requests} are taken",
                param="prompt",
            )

    def check_priority(self, priority: int) -> None:
        """400 for a priority that is not the client's to choose."""
        least = self.min_priority
        if priority < least:
            raise ApiError(400, f"priority: {priority} is more urgent than {least}, the most allowed", param="priority")
