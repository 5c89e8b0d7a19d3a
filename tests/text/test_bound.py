"""How many tokens a text has at least, without tokenizing it: never more than it has, for tokenizers of every kind."""

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cmjax.cli.options import BUNDLED_MODEL
from cmjax.text import Tokenizer, bound

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary(pieces):
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def byte_level(normalizer=None, *cuts, alphabet=ALPHABET, **model):
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "e"), ("ee", "ee"), ("Ã", "©")]
    pieces = [*alphabet, *(one + other for one, other in merges)]
    backend = Backend(models.BPE(vocab=vocabulary(pieces), merges=merges if len(alphabet) == 256 else [], **model))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def fallback(normalizer=None, cut=None, pieces=BYTES, **model):
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("é", "é")]
    words = ["▁", "t", "h", "e", "é", *(one + other for one, other in merges)]
    model = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, **model}
    backend = Backend(models.BPE(vocab=vocabulary(["<unk>", *pieces, *words]), merges=merges, **model))
    if normalizer is not None:
        backend.normalizer = normalizer
    if cut is not None:
        backend.pre_tokenizer = cut
    return backend


def with_token(backend, content, **how):
    backend.add_tokens([AddedToken(content, **how)])
    return backend


SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SOUND = {
    "byte level": byte_level(),
    "byte level, cut": byte_level(None, pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.Digits()),
    "byte level, composed": byte_level(normalizers.NFC()),
    "byte fallback": fallback(SPACES),
    "byte fallback, composed": fallback(normalizers.Sequence([normalizers.NFC(), SPACES])),
    "byte fallback, metaspace": fallback(cut=pre_tokenizers.Metaspace()),
    "a token that grows when normalized": with_token(fallback(SPACES), "x  y", normalized=True),
    "a long special token": with_token(byte_level(), "<|" + "long" * 20 + "|>", special=True),
    "the demonstration model's": Tokenizer.from_folder(BUNDLED_MODEL).backend,
}
# Characters that stick to others, that become shorter, that have many bytes, and what the tokens above are made of.
TEXTS = st.one_of(
    st.text(),
    st.text("K\u212a\u0327\u1100\u1161\u11a8\u03b1\u0313\u0300\u0345\u1fef\u0301e the\U0001f600", max_size=60),
    st.text("the é  xy", max_size=200),
)


@pytest.mark.parametrize("kind", SOUND)
def test_a_text_never_has_fewer(kind):
    tokenizer = Tokenizer(SOUND[kind], {}, Path(kind))
    assert tokenizer.least_tokens("import os\n" * 1000) > 1

    @given(TEXTS)
    def check(text):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))

    check()
    # The longest of all, one after another, as many as there are.
    for token, _ in sorted(tokenizer.backend.get_vocab().items(), key=lambda one: len(one[0]))[-20:]:
        text = tokenizer.decode([tokenizer.backend.token_to_id(token)] * 50, skip_special_tokens=False)
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


UNSOUND = {
    "unknown characters become one token": Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    "long words become one token": Backend(models.WordPiece(vocabulary(["[UNK]", "a"]), unk_token="[UNK]")),
    "words": Backend(models.WordLevel(vocabulary(["[UNK]", "a"]), unk_token="[UNK]")),
    "characters without a token": Backend(models.BPE(vocabulary(["a", "b"]), [])),
    "a byte is missing": byte_level(alphabet=ALPHABET[1:]),
    "a byte to fall back on is missing": fallback(pieces=BYTES[1:]),
    "no falling back": fallback(byte_fallback=False),
    "compatibility": byte_level(normalizers.NFKC()),
    "stripped": byte_level(normalizers.Strip()),
    "replaced by less": byte_level(normalizers.Replace("  ", " ")),
    "replaced by a pattern": byte_level(normalizers.Replace(Regex(" +"), "    ")),
    "left out between words": byte_level(None, pre_tokenizers.WhitespaceSplit()),
    "left out by a pattern": byte_level(None, pre_tokenizers.Split(Regex(r"\s+"), "removed")),
    "a token that takes the blanks before it": with_token(byte_level(), "<mask>", lstrip=True),
    "a token that takes the blanks behind it": with_token(byte_level(), "<end>", rstrip=True),
    "pieces with a mark": byte_level(end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_nothing_is_said_where_nothing_is_certain(kind):
    tokenizer = Tokenizer(UNSOUND[kind], {}, Path(kind))
    assert tokenizer.least_tokens("import os\n" * 1000) == 0


def test_composition_shortens_a_text_by_less_than_is_allowed_for():
    """Of every character that stays as it is: the longest text that it can come from, over its own length."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    parts = {one: unicodedata.normalize("NFD", one) for one in characters}
    longest = {}
    for one, apart in parts.items():
        if len(apart) == 1:
            longest[apart] = max(longest.get(apart, 0), len(one.encode()))
    composed = [one for one in characters if unicodedata.normalize("NFC", one) == one]
    most = max(sum(longest[part] for part in parts[one]) / len(one.encode()) for one in composed)
    assert 1 < most < bound._COMPOSITION
