"""The settings of an engine and of a server."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from cmjax.errors import UserError
from cmjax.moe import Exchange, FabricExchange, WireDtype
from cmjax.options import check_bounds, option
from cmjax.schedule import blocks_for

_MICROBATCHES = (1, 2, "auto")
# Of a request over HTTP that does not say otherwise: OpenAI's, which are not those of `SamplingParams`.
API_DEFAULTS: Mapping[str, float] = MappingProxyType({"temperature": 1.0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Sizes and formats of an engine."""

    max_model_len: int = option(
        1024, "Most tokens of one request, prompt and output together.", flag="--max-model-len", minimum=1
    )
    max_num_seqs_per_rank: int = option(
        8, "Requests that one decode rank runs together.", flag="--max-num-seqs", minimum=1
    )
    block_size: int = option(16, "Tokens of a cache block.", flag="--block-size", minimum=1)
    max_num_batched_tokens: int = option(
        2048,
        "Tokens of one prefill step over all the ranks of an instance; longer prompts take several.",
        flag="--max-num-batched-tokens",
        minimum=1,
    )
    steps_per_call: int = option(
        8, "Decode steps in one call of the compiled program.", flag="--steps-per-call", minimum=1
    )
    num_speculative_tokens: int = option(
        0, "Tokens that the model's MTP module guesses ahead in each decode step.", flag="--mtp", minimum=0
    )
    microbatches: int | Literal["auto"] = option(
        1,
        "Two take turns in a step, one attending while the other's rows travel; auto tries both and stays with the "
        "faster.",
        flag="--microbatches",
        choices=_MICROBATCHES,
    )
    dispatch_dtype: WireDtype | None = option(
        None,
        "What a row is on its way to the experts.",
        flag="--dispatch-dtype",
        choices=get_args(WireDtype),
        unset="int8 for a model in int8, else as it is",
    )
    combine_dtype: WireDtype | None = option(
        None,
        "What a row is on its way back.",
        flag="--combine-dtype",
        choices=("float32", "bfloat16", "float16"),
        unset="bfloat16 for a model in int8, else as it is",
    )
    num_redundant_experts: int | None = option(
        None,
        "Second copies of routed experts in the decode instance.",
        flag="--redundant-experts",
        minimum=0,
        unset="what fills the ranks",
    )
    num_shared_replicas: int | None = option(
        None,
        "Slots of the decode instance for the shared expert.",
        flag="--shared-replicas",
        minimum=0,
        unset="one in ten where ranks are left over",
    )
    exchange: Callable[..., Exchange] = option(FabricExchange, "Does dispatch and combine: a `cmjax.moe.Exchange`.")
    num_kv_blocks: int | None = option(
        None,
        "Cache blocks of a decode rank; with fewer than all, sequences get theirs as they grow, and the least urgent "
        "make room where there are none left.",
        flag="--num-kv-blocks",
        minimum=1,
        unset="for all requests at their longest",
    )
    num_prefill_kv_blocks: int | None = option(
        None,
        "Cache blocks of a prefill instance; those that no request uses keep prefixes in place.",
        flag="--num-prefill-kv-blocks",
        minimum=1,
        unset="for the longest prompt, and for two steps of short ones",
    )
    handoff_timeout_s: float = option(
        60.0, "Seconds after which a hand-off that has not arrived is sent again.", minimum=0, is_open=True
    )
    tpot_slo_ms: float | None = option(
        None,
        "Target for the time per output token, in milliseconds: as many sequences run together as keep to it.",
        flag="--tpot-slo-ms",
        minimum=0,
        is_open=True,
        unset="all there are",
    )

    def __post_init__(self) -> None:
        if self.microbatches not in _MICROBATCHES:
            listed = ", ".join(map(str, _MICROBATCHES))
            raise UserError(f"microbatches {self.microbatches} are not supported; supported: {listed}")
        check_bounds(self)
        if self.microbatches == 2 and self.max_num_seqs_per_rank % 2:
            raise UserError(
                f"microbatches {self.microbatches} do not divide max_num_seqs_per_rank {self.max_num_seqs_per_rank}"
            )
        if self.num_prefill_kv_blocks is not None and self.num_prefill_kv_blocks < self.max_blocks:
            raise UserError(
                f"num_prefill_kv_blocks {self.num_prefill_kv_blocks} cannot hold a prompt of max_model_len "
                f"{self.max_model_len}: that takes {self.max_blocks} blocks"
            )
        if self.num_speculative_tokens >= self.max_model_len:
            raise UserError(
                f"num_speculative_tokens {self.num_speculative_tokens} leaves no room in max_model_len "
                f"{self.max_model_len}: a step puts the newest token and its drafts into the cache"
            )

    @property
    def max_blocks(self) -> int:
        """Width of a block table: the blocks of the longest request."""
        return blocks_for(self.max_model_len, self.block_size)

    @property
    def num_decode_blocks(self) -> int:
        """Blocks of a decode rank."""
        return self.num_kv_blocks or self.max_num_seqs_per_rank * self.max_blocks

    @property
    def num_prefill_blocks(self) -> int:
        """Blocks of a prefill instance: by default room for the longest prompt, and for two steps of short ones."""
        two_steps = 2 * blocks_for(self.max_num_batched_tokens, self.block_size)
        return self.num_prefill_kv_blocks or self.max_blocks + two_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server offers, and its limits."""

    model_name: str = option(
        dataclasses.MISSING, "What clients call the model.", flag="--served-model-name", unset="the folder's name"
    )
    api_keys: tuple[str, ...] = option(
        (),
        "Clients must send it; several: a tenant each, served in turns. Where none is given, CMJAX_API_KEY or "
        "VLLM_API_KEY of the environment.",
        flag="--api-key",
        unset="anybody may",
    )
    api_key_file: str | None = option(None, "File with more keys, one a line.", flag="--api-key-file")
    open_pages: bool = option(
        False,
        "Ask for a key under /v1 and for /tokenize, /detokenize and /reset_prefix_cache alone, not for the status "
        "page, /docs, /version and the like.",
        flag="--open-pages",
    )
    share_prefix_cache: bool = option(
        False, "All API keys share one namespace of the prefix cache; else each has its own."
    )
    allowed_origins: tuple[str, ...] = option(
        ("*",), "Of web pages whose scripts may call the server.", flag="--allowed-origins", unset="all"
    )
    allowed_methods: tuple[str, ...] = option(
        ("*",), "That such scripts may use.", flag="--allowed-methods", unset="all"
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "That such scripts may send.", flag="--allowed-headers", unset="all"
    )
    allow_credentials: bool = option(False, "Such scripts may send cookies.", flag="--allow-credentials")
    generation_config: str = option(
        "auto",
        "Where defaults for what requests leave out come from: auto, the model's generation_config.json; vllm, "
        "nowhere; or a folder with such a file.",
        flag="--generation-config",
    )
    max_body_bytes: int = option(
        16_000_000, "Largest body of a request; the option is in MB.", flag="--max-body-mb", minimum=1, scale=1e6
    )
    receive_timeout_s: float = option(
        60.0,
        "Seconds that a client has to send the head of a request, and then all of its body; a 408 after that.",
        flag="--receive-timeout",
        minimum=0,
        is_open=True,
    )
    default_max_tokens: int = option(
        512,
        "Most tokens of the answer to a chat that does not say max_tokens, unless generation_config.json does.",
        flag="--default-max-tokens",
        minimum=1,
    )
    max_concurrent_requests: int = option(
        10_000,
        "Prompts times choices that may be under way; more get a 429.",
        flag="--max-concurrent-requests",
        minimum=1,
    )
    metrics_prefix: str = option("vllm:", "Of the Prometheus names.", flag="--metrics-prefix")
    # Priorities come before the tenants' turns, so a client that could go below everybody's would starve all others.
    min_priority: int = option(0, "Most urgent priority that a client may ask for.", flag="--min-priority")

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))


def _listed(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """The values of a setting that may be given several times, or once with a JSON list, as vLLM has it."""
    found: list[str] = []
    for value in values:
        if not value.startswith("["):
            found.append(value)
            continue
        try:
            several = json.loads(value)
        except ValueError as error:
            raise UserError(f"{name} {value!r} is no JSON list: {error}") from error
        if not all(isinstance(one, str) for one in several):
            raise UserError(f"{name} {value!r} is no list of texts")
        found += several
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where a server listens, and how it ends."""

    host: str = option("127.0.0.1", "Address to listen on.", flag="--host")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", flag="--port", minimum=0, maximum=65535)
    uds: str | None = option(None, "Listen on this Unix socket instead.", flag="--uds")
    drain_timeout_s: float = option(
        30.0,
        "Seconds that what runs has to finish, once the server is told to end; what has not is cut, and the exit "
        "status is 3.",
        flag="--drain-timeout",
        minimum=0,
    )
    log_level: str = option(
        "warning",
        "Of the server; debug logs every request.",
        flag="--log-level",
        choices=("critical", "error", "warning", "info", "debug"),
    )

    def __post_init__(self) -> None:
        check_bounds(self)
