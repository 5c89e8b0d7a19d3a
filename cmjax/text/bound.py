"""How much text a token can stand for: what says that a text has too many tokens without tokenizing it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cmjax.text.files import JsonObject

if TYPE_CHECKING:
    import tokenizers

# Canonical composition makes at most three bytes of UTF-8 one (K, the Kelvin sign, is one of them); one more to spare
# for characters that the library's Unicode has and others do not.
_COMPOSITION = 4
# They cut a text, or put longer characters for shorter ones, and never leave any out.
_CUTS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


def most_bytes_of_a_token(backend: "tokenizers.Tokenizer", byte_alphabet: set[str]) -> int | None:
    """The most bytes of a text (UTF-8) that one of its tokens can stand for; None where there is no such number.

    There is one for byte pairs over all bytes, or with bytes to fall back on: no character is left out, or becomes one
    unknown token together with others. A normalizer or a cut that may drop text, or a special token that takes the
    blanks beside it along, leaves none.

    Args:
        backend: the tokenizer.
        byte_alphabet: the characters that stand for bytes in byte-level vocabularies.
    """
    model: Any = backend.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    cuts = list(_steps(backend.pre_tokenizer, "pretokenizers"))
    if any(cut["type"] not in _CUTS or cut.get("behavior") == "Removed" for cut in cuts):
        return None
    factor = _shrinkage(list(_steps(backend.normalizer, "normalizers")))
    added = list(backend.get_added_tokens_decoder().values())
    if factor is None or any(token.lstrip or token.rstrip for token in added):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if any(cut["type"] == "ByteLevel" for cut in cuts):
        if not byte_alphabet <= vocabulary.keys():
            return None
        own = max(map(len, vocabulary))  # a character is a byte
    else:
        if not model.byte_fallback or not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
            return None
        own = max(len(token.encode()) for token in vocabulary)
    texts = [token.content for token in added]
    if backend.normalizer is not None:
        texts += [backend.normalizer.normalize_str(text) for text in texts]  # in which form some of them are looked for
    return factor * max([own, *(len(text.encode()) for text in texts)])


def _steps(part: Any, several: str) -> Iterator[JsonObject]:
    """What a part of a tokenizer does, in order, sequences within sequences laid flat."""

    def flat(one: JsonObject) -> Iterator[JsonObject]:
        if one["type"] != "Sequence":
            yield one
            return
        for inner in one[several]:
            yield from flat(inner)

    if part is not None:
        yield from flat(json.loads(part.__getstate__()))


def _shrinkage(normalizers: list[JsonObject]) -> int | None:
    """How many bytes of a text may become one, at most; None where any number may."""
    factor = 1
    for one in normalizers:
        if one["type"] == "NFC":
            factor *= _COMPOSITION
        elif one["type"] == "Replace":
            pattern = one["pattern"].get("String")
            if not pattern or len(one["content"].encode()) < len(pattern.encode()):
                return None
        elif one["type"] != "Prepend":
            return None
    return factor
