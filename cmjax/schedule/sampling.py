"""How a request is sampled: what its client may ask for, and as rows of arrays what a step needs of it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cmjax.errors import UserError
from cmjax.options import check_bounds, option
from cmjax.schedule.blocks import Ragged

NOT_FINITE = -2  # in place of a token id, where the logits hold NaN or infinity
NOT_FINITE_MESSAGE = (
    "its logits are not finite: the checkpoint holds NaN or infinite weights, or overflows in this dtype"
)
NOTHING_ALLOWED = -3  # in place of a token id, where a request's settings forbid every token
NOTHING_ALLOWED_MESSAGE = "its settings (allowed_token_ids, bad_words, min_tokens) leave no token to go on with"
MAX_LOGPROBS = 20
MAX_BAD_WORD_TOKENS = 256  # of all bad words of a request together
MAX_LOGIT_BIAS = 300  # tokens that have one
MOST_LOGIT_BIAS = 100  # either way
# Stop tokens of a request that a step looks for itself; those beyond are found when its tokens are taken, as all are
# where nothing is sampled.
MAX_STEP_STOPS = 8
_LEAST_TEMPERATURE = 1e-5  # below it the best token is taken, as vLLM does
_MOST_TEMPERATURE = 1e30  # all are alike long before; float32 has no inverse of 1e38, and 0 * -inf is NaN
_MOST_TOP_K = np.iinfo(np.int32).max


def token_problem(token_id: int) -> str | None:
    """What a step says in place of a token: why there is none; None for a token."""
    return {NOT_FINITE: NOT_FINITE_MESSAGE, NOTHING_ALLOWED: NOTHING_ALLOWED_MESSAGE}.get(token_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. The defaults take the best token each time.

    Attributes:
        stop_token_ids: the model's own `eos_token_id` stops nothing unless it is listed here.
        logit_bias: token id -> what is added to its logit, -100 to 100; at most `MAX_LOGIT_BIAS` tokens.
        bad_words: token ids in a row that are never generated; at most `MAX_BAD_WORD_TOKENS` together.
        allowed_token_ids: the only ones that are generated; None for all.
    """

    max_tokens: int = option(16, "Tokens to generate.", flag="--max-tokens", minimum=1)
    stop_token_ids: tuple[int, ...] = option(
        (), "A generated token among these ends the request, and is its last.", flag="--stop-token-ids"
    )
    min_tokens: int = option(0, "Tokens before which no stop token is generated.", flag="--min-tokens", minimum=0)
    temperature: float = option(
        0.0, "What logits are divided by before a token is drawn; 0 takes the best.", flag="--temperature", minimum=0
    )
    top_k: int = option(
        0,
        "Draw from so many of the best; 0 for all.",
        flag="--top-k",
        minimum=-1,
        must_be="positive, or 0 or -1 for all tokens",
    )
    top_p: float = option(
        1.0,
        "Draw from the best whose probabilities together reach it.",
        flag="--top-p",
        minimum=0,
        is_open=True,
        maximum=1,
    )
    min_p: float = option(
        0.0, "Draw from those at least so probable, as a share of the best.", flag="--min-p", minimum=0, maximum=1
    )
    presence_penalty: float = option(
        0.0, "Taken from the logits of tokens generated before, once.", flag="--presence-penalty", minimum=-2, maximum=2
    )
    frequency_penalty: float = option(
        0.0,
        "Taken from the logits of tokens generated before, for each time.",
        flag="--frequency-penalty",
        minimum=-2,
        maximum=2,
    )
    repetition_penalty: float = option(
        1.0,
        "Positive logits of tokens of the prompt and of those generated before are divided by it, negative ones "
        "multiplied.",
        flag="--repetition-penalty",
        minimum=0,
        is_open=True,
    )
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = option(
        None,
        "Equal seeds give equal tokens, whatever else runs.",
        flag="--seed",
        minimum=0,
        maximum=2**64 - 1,
        must_be="from 0 to 2^64 - 1",
        unset="another one each time",
    )
    logprobs: int | None = option(
        None,
        "Log probabilities of so many of the best tokens, beside the generated one's.",
        flag="--logprobs",
        minimum=0,
        maximum=MAX_LOGPROBS,
    )
    prompt_logprobs: int | None = option(
        None, "The same for the prompt's tokens.", flag="--prompt-logprobs", minimum=0, maximum=MAX_LOGPROBS
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise UserError(f"logit_bias of {len(self.logit_bias)} tokens: at most {MAX_LOGIT_BIAS} are supported")
        for token, value in self.logit_bias.items():
            if not abs(value) <= MOST_LOGIT_BIAS:
                raise UserError(
                    f"logit_bias of token {token} is {value}: it must be from -{MOST_LOGIT_BIAS} to {MOST_LOGIT_BIAS}"
                )

        self._check_forbidden()

    def _check_forbidden(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if self.min_tokens and len(self.stop_token_ids) > MAX_STEP_STOPS:
            raise UserError(
                f"min_tokens with {len(self.stop_token_ids)} stop tokens: at most {MAX_STEP_STOPS} are supported"
            )
        if not all(self.bad_words):
            raise UserError("bad_words: one of them is empty")
        num_bad = sum(map(len, self.bad_words))
        if num_bad > MAX_BAD_WORD_TOKENS:
            raise UserError(f"bad_words of {num_bad} tokens: at most {MAX_BAD_WORD_TOKENS} are supported")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UserError("allowed_token_ids is empty: no token is left to generate")

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before counts."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or any(len(word) > 1 for word in self.bad_words)
        )


@dataclasses.dataclass(frozen=True)
class SamplingShape:
    """What a compiled step can do for the requests of a batch, in few sizes, so that few are compiled.

    Attributes:
        is_sampled: some request does not just take the best token.
        num_bias, num_stop: biases and stop tokens of a request, at most. Where nothing is sampled, the stop tokens are
            left to those who take the tokens: they drop what a call has made behind one.
        has_penalties: what some request has generated counts.
        num_word_tokens: of the bad words of a request, at most.
        has_masks: some request allows some tokens alone, or has a repetition penalty, which needs its prompt's.
        num_logprobs, num_prompt_logprobs: best tokens at a place, at most; None where no request asks.
    """

    is_sampled: bool = False
    num_bias: int = 0
    num_stop: int = 0
    has_penalties: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    num_word_tokens: int = 0
    has_masks: bool = False

    @classmethod
    def for_all(cls, samplings: Iterable[SamplingParams]) -> "SamplingShape":
        """The smallest that does for all of these."""
        shape = cls()
        for one in samplings:
            num_bias = _rounded(len(one.logit_bias), MAX_LOGIT_BIAS)
            num_stop = _rounded(len(one.stop_token_ids), MAX_STEP_STOPS)
            num_words = _rounded(sum(map(len, one.bad_words)), MAX_BAD_WORD_TOKENS)
            has_masks = one.allowed_token_ids is not None or one.repetition_penalty != 1
            is_sampled = one.temperature > 0 or one.has_penalties or has_masks
            is_sampled |= bool(num_bias or num_words or (one.min_tokens and num_stop))
            asked = (one.logprobs, one.prompt_logprobs, num_words, has_masks)
            shape = shape.union(cls(is_sampled, num_bias, num_stop, one.has_penalties, *asked))
        return shape

    def covers(self, other: "SamplingShape") -> bool:
        """Whether this does for all that `other` does for."""
        num_stop = other.num_stop if other.is_sampled else 0
        return self == self.union(dataclasses.replace(other, num_stop=num_stop))

    def union(self, other: "SamplingShape") -> "SamplingShape":
        """What does for both."""
        return SamplingShape(
            self.is_sampled or other.is_sampled,
            max(self.num_bias, other.num_bias),
            max(self.num_stop, other.num_stop),
            self.has_penalties or other.has_penalties,
            _most(self.num_logprobs, other.num_logprobs),
            _most(self.num_prompt_logprobs, other.num_prompt_logprobs),
            max(self.num_word_tokens, other.num_word_tokens),
            self.has_masks or other.has_masks,
        )


# What a server's steps are compiled for: greedy requests alone, and whatever else a client may ask for.
SERVING_SHAPES = (
    SamplingShape(),
    SamplingShape(
        is_sampled=True,
        num_bias=MAX_LOGIT_BIAS,
        num_stop=MAX_STEP_STOPS,
        has_penalties=True,
        num_logprobs=MAX_LOGPROBS,
        num_prompt_logprobs=MAX_LOGPROBS,
        num_word_tokens=MAX_BAD_WORD_TOKENS,
        has_masks=True,
    ),
)


def _rounded(count: int, most: int) -> int:
    """The next power of two, at most `most`: few sizes."""
    return min(1 << (count - 1).bit_length(), most) if count else 0


def _most(one: int | None, other: int | None) -> int | None:
    return one if other is None else max(other, one or 0)


@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The settings of some requests as arrays, one row each, for the rows of a step.

    Attributes:
        temperature: `float32[rows]`, 0 for the best token.
        top_k: `int32[rows]`, 0 for all.
        top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty: `float32[rows]`.
        min_positions: `int32[rows]`, the first position that may hold a stop token.
        asks_logprobs: `int32[rows]`, whether the log probabilities of its tokens are asked for.
        seed: `uint32[rows, 2]`, high and low half.
        bias_ids, bias_values: int32 and float32, what each has.
        stop_ids: int32, what each has, at most `MAX_STEP_STOPS`.
        word_ids, word_ends: int32, the bad words of each one after another, and how many tokens come after each of
            theirs in its word.
        prompt_ids: int32, different tokens of the prompt, where there is a repetition penalty.
        allowed_ids: int32, none where all are allowed.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    repetition_penalty: np.ndarray
    min_positions: np.ndarray
    asks_logprobs: np.ndarray
    seed: np.ndarray
    bias_ids: Ragged
    bias_values: Ragged
    stop_ids: Ragged
    word_ids: Ragged
    word_ends: Ragged
    prompt_ids: Ragged
    allowed_ids: Ragged

    @classmethod
    def of(
        cls, samplings: Sequence[SamplingParams], seeds: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> "SamplingRows":
        """From one request a row: its settings, the seed of its noise, and its prompt's token ids."""
        temperatures = (min(one.temperature, _MOST_TEMPERATURE) for one in samplings)

        both = list(zip(samplings, prompts, strict=True))

        def floats(values: Iterable[float]) -> np.ndarray:
            return np.array(list(values), np.float32)

        return cls(
            temperature=floats(t if t >= _LEAST_TEMPERATURE else 0.0 for t in temperatures),
            top_k=np.array([min(max(one.top_k, 0), _MOST_TOP_K) for one in samplings], np.int32),
            top_p=floats(one.top_p for one in samplings),
            min_p=floats(one.min_p for one in samplings),
            presence_penalty=floats(one.presence_penalty for one in samplings),
            frequency_penalty=floats(one.frequency_penalty for one in samplings),
            repetition_penalty=floats(one.repetition_penalty for one in samplings),
            min_positions=np.array(
                [len(prompt) + one.min_tokens if one.min_tokens else 0 for one, prompt in both], np.int32
            ),
            asks_logprobs=np.array([one.logprobs is not None for one in samplings], np.int32),
            seed=np.array([(s >> 32 & 0xFFFFFFFF, s & 0xFFFFFFFF) for s in seeds], np.uint32).reshape(-1, 2),
            bias_ids=Ragged.of([list(one.logit_bias) for one in samplings]),
            bias_values=Ragged.of([list(one.logit_bias.values()) for one in samplings], np.float32),
            stop_ids=Ragged.of([one.stop_token_ids[:MAX_STEP_STOPS] for one in samplings]),
            word_ids=Ragged.of([[token for word in one.bad_words for token in word] for one in samplings]),
            word_ends=Ragged.of(
                [[end for word in one.bad_words for end in range(len(word) - 1, -1, -1)] for one in samplings]
            ),
            prompt_ids=Ragged.of([sorted(set(prompt)) if one.repetition_penalty != 1 else () for one, prompt in both]),
            allowed_ids=Ragged.of([one.allowed_token_ids or () for one in samplings]),
        )


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place, by the model's own logits.

    Attributes:
        token_id, logprob: of the token that is there.
        rank: its place among all tokens, 1 for the most probable.
        top: (token id, log probability) of the most probable, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class LogprobArrays:
    """Log probabilities that a step returns, of some places; shapes `[places]` and `[places, n]`.

    Attributes:
        chosen: float32, of the token that is there.
        rank: int32, its place among all, 1 for the best.
        top_ids, top: int32 and float32, the n best, best first.
    """

    chosen: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    def at(self, place: int, token_id: int, num_top: int) -> TokenLogprobs:
        """One place, with so many of the best."""
        top = zip(self.top_ids[place, :num_top].tolist(), self.top[place, :num_top].tolist(), strict=True)
        return TokenLogprobs(token_id, float(self.chosen[place]), int(self.rank[place]), tuple(top))
