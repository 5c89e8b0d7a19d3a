"""What clients may send and what it asks for: bodies checked, conversations rendered, texts tokenized. Without JAX, so
that a process of its own can do it; needs the extra `cmjax[serve]`."""

from cmjax.api.encoding import gathered, json_pieces
from cmjax.api.errors import FAILED, ApiError
from cmjax.api.intake import INLINE_BYTES, Intake, IntakeError
from cmjax.api.prompts import Prompt
from cmjax.api.protocol import BODIES, ChatRequest, CompletionRequest, Kind, Sampled
from cmjax.api.sampling import choice_seed
from cmjax.api.served import Served
from cmjax.api.taking import Asked, Taken, take
from cmjax.api.template import ChatTemplate

__all__ = [
    "BODIES",
    "FAILED",
    "INLINE_BYTES",
    "ApiError",
    "Asked",
    "ChatRequest",
    "ChatTemplate",
    "CompletionRequest",
    "Intake",
    "IntakeError",
    "Kind",
    "Prompt",
    "Sampled",
    "Served",
    "Taken",
    "choice_seed",
    "gathered",
    "json_pieces",
    "take",
]
