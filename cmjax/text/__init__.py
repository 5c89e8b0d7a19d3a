"""Text and token ids: a model folder's tokenizer, and text of tokens as they come; without JAX."""

from cmjax.text.detokenizer import Detokenizer, starts_in, token_starts
from cmjax.text.files import JsonObject, read_json
from cmjax.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "JsonObject", "Tokenizer", "read_json", "starts_in", "token_starts"]
