"""Text as tokens come: the pieces are the whole text's, which is the library's own, for tokenizers of every kind."""

import itertools
import os

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from cmjax.cli.options import BUNDLED_MODEL
from cmjax.text import Detokenizer, Tokenizer, starts_in, token_starts

SPECIAL = ["<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁the", "▁é", "a", "b", "the", "é", "日", "本", ".", "▁▁", "'s", "##s", "x▁y"]


def make(kind):
    """A tokenizer with the decoder of a kind of models."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if kind == "byte level":
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ġ", "t"), ("h", "e"), ("Ã", "©"), ("æ", "Ĺ"), ("æĹ", "¥"), ("Ġt", "he")]
        vocab = [*pieces, *("".join(pair) for pair in merges), *SPECIAL]
        backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        vocab = {piece: i for i, piece in enumerate(["<unk>", *SPECIAL, *BYTES, *WORDS])}
        backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = {
            "sentencepiece": decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
            "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
            "word pieces": decoders.WordPiece(),
            "none": None,
        }[kind]
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool>"])  # added, and part of the text
    return Tokenizer(backend, config, BUNDLED_MODEL)


KINDS = ("byte level", "sentencepiece", "metaspace", "word pieces", "none")
TOKENIZERS = {kind: make(kind) for kind in KINDS} | {"demo": Tokenizer.from_folder(BUNDLED_MODEL)}


def some_ids(tokenizer):
    """Anything, with more bytes, special tokens and beginnings of characters than chance has."""
    ids = list(range(tokenizer.vocab_size))
    often = [tokenizer.backend.token_to_id(token) for token in (*SPECIAL, *WORDS, "Ġ", "Ã", "©", "<0xE6>", "<0x97>")]
    often += [tokenizer.backend.token_to_id(token) for token in ("<0xA5>", "<tool>", "æ", "Ĺ", "¥")]
    return st.lists(st.sampled_from(ids) | st.sampled_from([i for i in often if i is not None]), max_size=16)


def behind(tokenizer, context, ids, skip):
    known, whole = (tokenizer.decode(one, skip) for one in (context, [*context, *ids]))
    return whole[len(os.path.commonprefix([known, whole])) :]  # noqa: RUF071 # of characters, not of folders


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
def test_pieces_are_the_whole_text_behind_what_came_before(kind, data, skip):
    tokenizer = TOKENIZERS[kind]
    context, ids = data.draw(some_ids(tokenizer)), data.draw(some_ids(tokenizer))
    detokenizer = Detokenizer(tokenizer, skip, context)
    pieces = [detokenizer.feed(token_id) for token_id in ids]
    text = behind(tokenizer, context, ids, skip)
    shown = list(itertools.accumulate(pieces))
    assert all(text.startswith(one) for one in shown)  # nothing is taken back
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "metaspace", "demo"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_text_comes_as_soon_as_it_is_certain(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids, detokenizer = tokenizer.encode(text), Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)
        if kind in ("byte level", "demo"):
            assert "".join(pieces) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_the_bytes_of_tokens_make_the_text(kind, data):
    """Where the decoder does no more than put them together."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(some_ids(tokenizer))
    joined = b"".join(map(tokenizer.token_bytes, ids))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if kind in ("byte level", "demo"):
        assert joined.decode(errors="replace") == text
    elif kind == "sentencepiece" and "\ufffd" not in text and "<unk>" not in text:
        assert joined.decode().removeprefix(" ") == text


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "metaspace", "demo"])
@given(data=st.data(), skip=st.booleans())
def test_tokens_begin_where_their_text_does(kind, data, skip):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(some_ids(tokenizer))
    text, starts = tokenizer.decode(ids, skip), token_starts(tokenizer, ids, skip)
    assert starts == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    if "\ufffd" in text:
        return
    for place, (token_id, start) in enumerate(zip(ids, starts, strict=True)):
        own = tokenizer.token_bytes(token_id)
        if token_id in tokenizer.special_ids and skip:
            continue
        try:
            own_text = own.decode()
        except UnicodeDecodeError:
            continue
        forms = {own_text}
        if place == 0 or start == 0:  # where decoders leave blanks out, that of "metaspace" within the token too
            forms |= {own_text.lstrip(" "), own_text.replace(" ", "")}
        assert text[start:].startswith(tuple(forms))


def test_special_tokens_around_a_text_begin_at_its_ends():
    tokenizer = TOKENIZERS["byte level"]
    ids, starts = starts_in(tokenizer, "é the<|user|>日")
    assert ids == tokenizer.encode("é the<|user|>日")
    assert ids[0] == tokenizer.bos_token_id
    # é of one token, "日" of two; the blank belongs to its word.
    assert starts == [0, 0, 1, 5, 13]
    backend = make("byte level").backend
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    own = Tokenizer(backend, {"bos_token": "<s>"}, BUNDLED_MODEL)
    ids, starts = starts_in(own, "the")
    assert ids == [own.bos_token_id, *own.encode_with_ends("the")[0], backend.token_to_id("</s>")]
    assert (starts[0], starts[-1]) == (0, 3)
