"""The engine: prefill instances, a decode instance, and the way of a request through them."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

from cmjax.errors import UserError
from cmjax.mesh import Pools, Supernode, carve
from cmjax.model import Model, check_token_ids, token_id_array
from cmjax.serve.block_pool import blocks_for
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.instance import PlacedModel
from cmjax.serve.prefill_instance import PrefillInstance
from cmjax.serve.request import Request, RequestOutput, SamplingParams
from cmjax.serve.settings import EngineSettings, cache_bytes
from cmjax.serve.transfer import hand_off

# (what is under way, tokens so far, tokens in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Timings:
    """Seconds and counts of a `generate` call; compilation is apart from the phases.

    Attributes:
        compile_s: compiling and warming up the steps.
        prefill_s, prefill_tokens: prefill steps and the prompt tokens they computed.
        handoff_s: copying latents to the decode ranks.
        decode_s, decode_tokens, decode_steps: decode calls, the tokens taken from them, the steps they ran.
    """

    compile_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    handoff_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second of decode."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `Engine.generate` returns.

    Attributes:
        outputs: in the order of the prompts.
        timings: of the call.
        prefill_load, decode_load: `int64[moe layers, routed experts]`, rows by logical expert, the MTP layer's last.
        kept_drafts: `int64[k + 1]`, in how many of the requests' steps 0, 1, ... k drafts were kept.
    """

    outputs: list[RequestOutput]
    timings: Timings
    prefill_load: np.ndarray
    decode_load: np.ndarray
    kept_drafts: np.ndarray

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were kept; 0 without any."""
        num_drafts = len(self.kept_drafts) - 1
        offered = num_drafts * int(self.kept_drafts.sum())
        return float(self.kept_drafts @ np.arange(num_drafts + 1)) / offered if offered else 0.0


class Engine:
    """Serves a model on a machine: prefill instances and one decode instance as peers.

    Args:
        model: from `cmjax.load`.
        supernode: the machine, by default the preset `cloudmatrix384`; or pools already carved (`cmjax.mesh.carve`).
        ep_size, prefill_ep_size, num_prefill_instances: see `cmjax.mesh.carve`.
        settings: sizes and formats.

    Raises:
        UserError: devices, experts or memory do not suffice, by number and setting.
    """

    def __init__(
        self,
        model: Model,
        supernode: Supernode | Pools | None = None,
        *,
        ep_size: int | None = None,
        prefill_ep_size: int | None = None,
        num_prefill_instances: int | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        if isinstance(supernode, Pools):
            self.pools = supernode
        else:
            self.pools = carve(
                supernode or Supernode.preset("cloudmatrix384"),
                ep_size=ep_size,
                prefill_ep_size=prefill_ep_size,
                num_prefill_instances=num_prefill_instances,
            )
        self._check_memory()
        counts = {
            "num_redundant_experts": self.settings.num_redundant_experts,
            "num_shared_replicas": self.settings.num_shared_replicas,
        }
        self.decode = DecodeInstance(model, self.pools.decode[0], self.settings, self._decode_blocks, **counts)
        self.prefill = [PrefillInstance(model, one, self.settings, self._prefill_blocks) for one in self.pools.prefill]

    @property
    def _decode_blocks(self) -> int:
        return self.settings.max_num_seqs_per_rank * self.settings.max_blocks

    @property
    def _prefill_blocks(self) -> int:
        # Room for the longest prompt, and for a full step of short ones.
        budget = blocks_for(self.settings.max_num_batched_tokens, self.settings.block_size)
        return self.settings.max_blocks + budget

    def _check_memory(self) -> None:
        """Refuse caches that cannot fit, before anything is allocated."""
        config, settings, dtype = self.model.config, self.settings, self.model.dtype
        longest = config.max_position_embeddings
        if settings.max_model_len > longest:
            raise UserError(
                f"max_model_len {settings.max_model_len} exceeds the model's max_position_embeddings {longest}"
            )
        sizes = [(instance.ep_size, self._prefill_blocks) for instance in self.pools.prefill]
        sizes.append((self.pools.decode[0].ep_size, self._decode_blocks))
        needed = sum(ranks * cache_bytes(config, blocks, settings.block_size, dtype) for ranks, blocks in sizes)
        available = psutil.virtual_memory().available
        if needed > available:
            raise UserError(
                f"the KV caches need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: lower "
                f"max_model_len ({settings.max_model_len}), max_num_seqs_per_rank ({settings.max_num_seqs_per_rank}) "
                f"or max_num_batched_tokens ({settings.max_num_batched_tokens})"
            )

    def _requests(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Request]:
        """Check the prompts and make requests of them."""
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(sampling)} sampling params")
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            ids = check_token_ids(token_id_array(prompt, f"prompt {index}"), self.model.config)
            if ids.ndim != 1 or not ids.size:
                raise UserError(f"prompt {index} is {'empty' if ids.ndim == 1 else 'no list of token ids'}")
            request = Request(index, ids.tolist(), params)
            limit = self.settings.max_model_len
            if len(ids) + params.max_tokens > limit:
                raise UserError(
                    f"prompt {index} of {len(ids)} tokens with max_tokens {params.max_tokens} exceeds "
                    f"max_model_len {limit}"
                )
            outside = [token for token in params.logit_bias if not 0 <= token < self.model.config.vocab_size]
            if outside:
                last = self.model.config.vocab_size - 1
                raise UserError(
                    f"prompt {index}: logit_bias of token {outside[0]}, outside the vocabulary (0 to {last})"
                )
            requests.append(request)
        return requests

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> GenerateResult:
        """Continue prompts of token ids; more of them than there are places wait for their turn.

        Args:
            prompts: lists of token ids, each at least one token.
            sampling: for all, or one each.
            progress: called with ("compile" | "prefill" | "decode", tokens so far, tokens in all).

        Raises:
            UserError: an empty prompt, a token id outside the vocabulary, a prompt that does not fit the cache.
        """
        requests = self._requests(prompts, SamplingParams() if sampling is None else sampling)
        timings = Timings()
        try:
            self._run(requests, timings, progress or (lambda *_: None))
        except BaseException:
            # What was under way is lost, and a cache given to a failed step with it: start the next call afresh.
            instances: list[PlacedModel] = [*self.prefill, self.decode]
            for instance in instances:
                instance.reset()
            raise
        prefill_load, decode_load = self.take_load()
        outputs = [r.output() for r in requests]
        return GenerateResult(outputs, timings, prefill_load, decode_load, self.decode.take_kept_drafts())

    def _run(self, requests: Sequence[Request], timings: Timings, notify: Progress) -> None:
        num_done, num_output = 0, sum(r.sampling.max_tokens for r in requests)
        notify("compile", 0, num_output)
        with _timed(timings, "compile_s"):
            self._warm_up(requests)
        self.take_load()
        notify("prefill", 0, num_output)  # compiled: what is counted from here on is the requests' own
        waiting, num_steps = deque(requests), self._num_steps(requests)
        while waiting or self.decode.running():
            for num_first in self._admit(waiting, timings):
                num_done += num_first
                notify("prefill", num_done, num_output)
            self._release_finished()
            if self.decode.running():
                with _timed(timings, "decode_s"):
                    taken = self.decode.call(num_steps)
                timings.decode_tokens += taken
                timings.decode_steps += num_steps
                num_done += taken
                notify("decode", num_done, num_output)
                self._release_finished()

    def _admit(self, waiting: deque[Request], timings: Timings) -> Iterator[int]:
        """Reserve decode places for waiting requests, prefill them, hand them over; yield each step's first tokens.

        The decode side reserves first, so that a prefilled prompt always has a place to go.
        """
        shares: list[list[Request]] = [[] for _ in self.prefill]
        while waiting:
            index = min(range(len(shares)), key=lambda i: (sum(len(r.prompt_ids) for r in shares[i]), i))
            if not self.prefill[index].can_hold([*shares[index], waiting[0]]) or not self.decode.reserve(waiting[0]):
                break
            shares[index].append(waiting.popleft())
        runs = [(source, source.run(share)) for source, share in zip(self.prefill, shares, strict=True) if share]
        longest = max((len(r.prompt_ids) for share in shares for r in share), default=1)
        while runs:
            # The instances take their steps at the same time, on devices of their own.
            with _timed(timings, "prefill_s"), ThreadPoolExecutor(len(runs)) as threads:
                steps = list(threads.map(lambda run: next(run[1], None), runs))
            for (source, _), ended in zip(runs, steps, strict=True):
                if not ended:
                    continue
                with _timed(timings, "handoff_s"):
                    hand_off(source, self.decode, ended, min_tokens=longest)
                for one in ended:
                    one.request.append([one.token_id])
                    timings.prefill_tokens += len(one.request.prompt_ids)
                yield len(ended)
            runs = [run for run, step in zip(runs, steps, strict=True) if step is not None]
        self.decode.batch_changed()

    def _release_finished(self) -> None:
        for request in self.decode.running():
            if request.finish_reason:
                self.decode.release(request)

    def _num_steps(self, requests: Sequence[Request]) -> int:
        """Decode steps of a call: no more than any of the requests can use, its first token coming from prefill."""
        most = max((r.sampling.max_tokens - 1 for r in requests), default=0)
        return min(self.settings.steps_per_call, most)

    def _warm_up(self, requests: Sequence[Request]) -> None:
        """Compile the steps these requests will need, so that the phases time only themselves."""
        if not requests:
            return
        lengths = [len(r.prompt_ids) for r in requests]
        share = min(sum(lengths), sum(lengths) // len(self.prefill) + max(lengths))
        # One after another: programs that several threads start on shared devices could queue in different orders.
        for instance in self.prefill:
            instance.warm_up(share, requests)
        if num_steps := self._num_steps(requests):
            self.decode.warm_up(num_steps, requests)
        for instance in self.prefill:
            hand_off(instance, self.decode, [], min_tokens=max(lengths))

    def take_load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return and forget the rows by logical expert since the last call: prefill's and decode's."""
        prefill = [one.take_expert_load() for one in self.prefill]
        return np.sum(prefill, axis=0), self.decode.take_expert_load()


@contextlib.contextmanager
def _timed(timings: Timings, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    setattr(timings, name, getattr(timings, name) + time.perf_counter() - begin)
