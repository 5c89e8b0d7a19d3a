"""From tokens to text as they come, and where in the text each of them begins."""

from collections.abc import Sequence

from cmjax.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of token ids as they come. All pieces together are what the tokens say behind those before them:
    `decode(context + tokens)` without `decode(context)`; what more tokens could change is held back.

    Attributes:
        num_characters: of the text so far, those that are whole and held back among them: where the next token begins.
    """

    # Tokens before the newest that decide how it reads: whether it is the first, and what character it is a part of.
    _WINDOW = 8

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = self._window(context)
        self._known = self._decode()
        self._num_given = self.num_characters = 0

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token, perhaps none."""
        self._ids.append(token_id)
        if not self._tokenizer.is_streamable:
            return ""
        text = self._decode()
        new = _behind(self._known, text)
        self.num_characters = max(self.num_characters, self._num_given + len(new.rstrip("\ufffd")))
        if text.endswith("\ufffd") or self._ends_in_a_run():
            return ""
        self._give(new, text)
        return new

    def flush(self) -> str:
        """What is left when nothing more comes: replacement characters for bytes that never became one."""
        text = self._decode()
        new = _behind(self._known, text)
        self._give(new, text)
        return new

    def _give(self, new: str, text: str) -> None:
        self._num_given += len(new)
        self.num_characters = self._num_given
        self._known = text
        if len(self._ids) > 3 * self._WINDOW:  # not each time: it is decoded once more
            self._ids = self._window(self._ids)
            self._known = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip)

    def _is_silent(self, token_id: int) -> bool:
        return self._skip and token_id in self._tokenizer.special_ids

    def _ends_in_a_run(self) -> bool:
        newest = next((token_id for token_id in reversed(self._ids) if not self._is_silent(token_id)), None)
        return newest is not None and self._tokenizer.is_byte(newest)

    def _window(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, of which enough have a text; a run of bytes is whole."""
        if not self._tokenizer.is_streamable:
            return list(ids)
        begin, num_found = len(ids), 0
        while begin > 0:
            begin -= 1
            if self._is_silent(ids[begin]):
                continue
            num_found += 1
            if num_found >= self._WINDOW and not self._tokenizer.is_byte(ids[begin]):
                break
        return list(ids[begin:])


def _behind(known: str, text: str) -> str:
    """What comes behind `known`, of which a last character may have become another one."""
    if text.startswith(known):
        return text[len(known) :]
    same = next(index for index, (one, other) in enumerate(zip(known, text + "\0", strict=False)) if one != other)
    return text[same:]


def token_starts(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = False) -> list[int]:
    """Where each token begins in `decode(token_ids)`, in characters; those of one character begin with it."""
    detokenizer, starts = Detokenizer(tokenizer, skip_special_tokens), []
    for token_id in token_ids:
        starts.append(detokenizer.num_characters)
        detokenizer.feed(token_id)
    return starts


def starts_in(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text with the special tokens around it, and where each begins in it, in characters."""
    ids, starts = tokenizer.encode_with_starts(text)
    own = [token_id for token_id, start in zip(ids, starts, strict=True) if start is not None]
    if tokenizer.decode(own, skip_special_tokens=False) == text:
        # The tokens say it letter by letter: blanks before a word belong to its token.
        exact = iter(token_starts(tokenizer, own))
        starts = [None if start is None else next(exact) for start in starts]
    num_left, found = len(own), []
    for start in starts:
        found.append((len(text) if num_left == 0 else 0) if start is None else start)
        num_left -= start is not None
    return ids, found
