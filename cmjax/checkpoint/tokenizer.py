"""Text and token ids: a model folder's `tokenizer.json`, and what its `tokenizer_config.json` says about it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmjax.checkpoint.safetensors import read_json
from cmjax.errors import UserError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        bos_token, eos_token: their text, None where the folder names none.
        bos_token_id, eos_token_id: their ids.
        add_bos_token: whether a text begins with bos.
        chat_template: Jinja source, or None.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", config: dict[str, Any], where: Path) -> None:
        self.backend = backend
        self.bos_token, self.bos_token_id = self._special(config, "bos_token", where)
        self.eos_token, self.eos_token_id = self._special(config, "eos_token", where)
        self.add_bos_token = bool(config.get("add_bos_token", False)) and self.bos_token_id is not None
        template = config.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where there is one, `tokenizer_config.json`.

        Raises:
            UserError: the folder has no tokenizer, or one that cannot be read.
        """
        import tokenizers  # a tenth of a second, which only those who have text should pay

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: not found; text needs the model's tokenizer (token ids do not)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise UserError(f"{path}: not a tokenizer: {error}") from error
        # A tokenizer may be saved with padding or truncation, which would change the text's tokens.
        backend.no_padding()
        backend.no_truncation()
        config_path = Path(folder) / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        return cls(backend, config, config_path)

    def _special(self, config: dict[str, Any], name: str, where: Path) -> tuple[str | None, int | None]:
        token = config.get(name)
        if isinstance(token, dict):  # an older style: {"content": "...", ...}
            token = token.get("content")
        if token is None:
            return None, None
        token_id = self.backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise UserError(f"{where}: {name} {json.dumps(token)} is not in the vocabulary")
        return token, token_id

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, bos first where the model wants it.

        Raises:
            UserError: half of a surrogate pair, which is what bytes of a command line become that are not UTF-8.
        """
        ids: list[int] = self._encoding(text).ids
        if self.add_bos_token and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without bos, and where each ends in it, in characters; raises as `encode` does."""
        encoded = self._encoding(text)
        return encoded.ids, [end for _, end in encoded.offsets]

    def _encoding(self, text: str) -> "tokenizers.Encoding":
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise UserError(f"{shown!r} is not Unicode text: {error.reason} at character {error.start}") from error
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=True)
