"""Text and token ids: a model folder's `tokenizer.json`, and what the files beside it say about it.

Ids and text are those of Hugging Face transformers (5.x, `PreTrainedTokenizerFast`).
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmjax.errors import UserError
from cmjax.text.bound import most_bytes_of_a_token
from cmjax.text.files import JsonObject, read_json

if TYPE_CHECKING:
    import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MANY_TOKENS = 256  # decoding them takes a while
# Decoders that make the text of a token from it alone, and from whether it is the first.
_STREAMABLE = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        bos_token, eos_token: their text, None where the folder names none.
        bos_token_id, eos_token_id: their ids.
        special_tokens: text of all that the folder names, by name (`bos_token`, `pad_token`, ...).
        chat_templates: Jinja source by name; that of most folders is "default".
        is_streamable: whether the text of more tokens begins with that of the first, but for its last character; where
            it does not, text is certain only when all tokens are there.
        has_byte_runs: bytes that are tokens of their own become characters when the next token is none of them.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        config: Mapping[str, object],
        where: Path,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`config`: of tokenizer_config.json, read from `where`; `chat_templates`: of files, in place of `config`'s."""
        self.backend = backend
        self.special_tokens = {name: text for name in SPECIAL_NAMES if (text := _content(config.get(name))) is not None}
        self.bos_token, self.bos_token_id = self._special("bos_token", where)
        self.eos_token, self.eos_token_id = self._special("eos_token", where)
        # What the config says in so many words replaces the tokenizer's own template of special tokens.
        self._has_template = backend.post_processor is not None and not {"add_bos_token", "add_eos_token"} & set(config)
        self._before = [self.bos_token_id] if config.get("add_bos_token") and self.bos_token_id is not None else []
        self._after = [self.eos_token_id] if config.get("add_eos_token") and self.eos_token_id is not None else []
        self.chat_templates = dict(chat_templates or _templates(config.get("chat_template"), where))
        decoders = list(_decoders(backend))
        kinds = [one["type"] for one in decoders]
        self.has_byte_runs = "ByteFallback" in kinds
        # Made for word pieces; of byte pairs it would spoil the text.
        self._cleans_up = bool(config.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"
        self.is_streamable = all(map(_is_streamable, decoders)) and not self._cleans_up
        self._decoders = decoders

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where they are there, `tokenizer_config.json`, `special_tokens_map.json`,
        `chat_template.jinja` and `additional_chat_templates/*.jinja`.

        Raises:
            UserError: the folder has no tokenizer, or one that cannot be read.
        """
        import tokenizers  # a tenth of a second, which only those who have text should pay

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: not found; text needs the model's tokenizer (token ids do not)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise UserError(f"{path}: not a tokenizer: {error}") from error
        # A tokenizer may be saved with padding or truncation, which would change the text's tokens.
        backend.no_padding()
        backend.no_truncation()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        named = folder / "special_tokens_map.json"
        if named.is_file():
            config = read_json(named) | config
        files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
        files |= {one.stem: one for one in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        return cls(backend, config, config_path, {name: _read_text(one) for name, one in files.items()})

    def _special(self, name: str, where: Path) -> tuple[str | None, int | None]:
        token = self.special_tokens.get(name)
        if token is None:
            return None, None
        token_id = self.backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise UserError(f"{where}: {name} {json.dumps(token)} is not in the vocabulary")
        return token, token_id

    @property
    def chat_template(self) -> str | None:
        """The default one's source."""
        return self.chat_templates.get("default")

    @property
    def thinks(self) -> bool:
        """Whether there is a token that thoughts begin with, as reasoning models have it."""
        return self.backend.token_to_id("<think>") is not None

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    # -- text to tokens -----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model wants around it.

        Raises:
            UserError: half of a surrogate pair, which is what bytes of a command line become that are not UTF-8.
        """
        return [*self._before, *self._encoding(text, self._has_template).ids, *self._after]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without special ones, and where each ends in it, in characters; raises as `encode`."""
        encoded = self._encoding(text, False)
        return encoded.ids, [end for _, end in encoded.offsets]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int | None]]:
        """Token ids as of `encode`, and where each begins in the text, in characters; None: it is not of the text."""
        encoded = self._encoding(text, self._has_template)
        starts = [
            None if is_added else start
            for (start, _), is_added in zip(encoded.offsets, encoded.special_tokens_mask, strict=True)
        ]
        before, after = [None] * len(self._before), [None] * len(self._after)
        return [*self._before, *encoded.ids, *self._after], [*before, *starts, *after]

    def _encoding(self, text: str, add_special_tokens: bool) -> "tokenizers.Encoding":
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise UserError(f"{shown!r} is not Unicode text: {error.reason} at character {error.start}") from error
        # Unlike `encode` it lets other threads run meanwhile.
        return self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least, without tokenizing it; 0 where nothing can be said."""
        most = self._most_bytes
        return 0 if most is None else -(-len(text.encode()) // most)

    @functools.cached_property
    def _most_bytes(self) -> int | None:
        return most_bytes_of_a_token(self.backend, set(_BYTE_OF))

    # -- tokens to text -----------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; special tokens are left out."""
        if len(token_ids) < _MANY_TOKENS:
            text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:  # lets other threads run meanwhile
            (text,) = self.backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return _cleaned(text) if self._cleans_up else text

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a byte of a run, see `has_byte_runs`."""
        return self.has_byte_runs and _BYTE_TOKEN.fullmatch(self.backend.id_to_token(token_id) or "") is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, within it; none for an id that is no token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        for decoder in self._decoders:
            if decoder["type"] == "ByteLevel":
                if all(character in _BYTE_OF for character in token):
                    return bytes(_BYTE_OF[character] for character in token)
            elif decoder["type"] == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(byte[1], 16)])
            elif decoder["type"] == "Replace" and "String" in decoder["pattern"]:
                token = token.replace(decoder["pattern"]["String"], decoder["content"])
            elif decoder["type"] == "Metaspace":
                token = token.replace(decoder["replacement"], " ")
        return token.encode()


def _content(token: Any) -> Any:
    """Of a special token in the older style, `{"content": "...", ...}`, or as it is."""
    return token.get("content") if isinstance(token, dict) else token


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _templates(given: object, where: Path) -> dict[str, str]:
    """What `chat_template` of tokenizer_config.json may be: a text, or a list of named ones."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    named = list(given.items()) if isinstance(given, dict) else None
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        named = [(one.get("name"), one.get("template")) for one in given]
    if named is None or not all(isinstance(name, str) and isinstance(text, str) for name, text in named):
        raise UserError(f"{where}: chat_template is neither a text nor a list of {{name, template}}")
    return dict(named)


def _decoders(backend: "tokenizers.Tokenizer") -> Iterator[JsonObject]:
    """What makes text of tokens, as the file describes it, in order."""
    if backend.decoder is None:
        return
    described = json.loads(backend.decoder.__getstate__())
    yield from described["decoders"] if described["type"] == "Sequence" else [described]


def _is_streamable(decoder: JsonObject) -> bool:
    if decoder["type"] == "Replace":
        return len(decoder["pattern"].get("String", "")) == 1
    if decoder["type"] == "Strip":
        return decoder["stop"] == 0
    return decoder["type"] in _STREAMABLE


def _byte_of_characters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of_characters()
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m"}
_CLEANED |= {f" '{end}": f"'{end}" for end in ("s", "ve", "re")}


def _cleaned(text: str) -> str:
    """Without the spaces that word pieces leave before punctuation (`clean_up_tokenization_spaces`)."""
    for found, better in _CLEANED.items():
        text = text.replace(found, better)
    return text
