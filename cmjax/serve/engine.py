"""The engine: prefill and decode instances as peers, requests from submission to their last token."""

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cmjax.errors import UserError
from cmjax.mesh import Pools, Supernode, carve, fabric
from cmjax.model import Model, check_token_ids, token_id_array
from cmjax.schedule import (
    EngineStats,
    RatioPolicy,
    Request,
    RequestTimes,
    Role,
    SamplingParams,
    Scheduler,
    blocks_for,
)
from cmjax.serve.caching import CacheSettings, MemoryPool
from cmjax.serve.core import Core
from cmjax.serve.fleet import Fleet
from cmjax.serve.handle import RequestHandle
from cmjax.serve.instances import DecodeExecutor, PrefillExecutor
from cmjax.serve.offline import GenerateResult, Progress, run_to_end
from cmjax.serve.prefix_cache import make_chain, open_context
from cmjax.serve.settings import EngineSettings
from cmjax.serve.startup import StartProgress, Startup

logger = logging.getLogger(__name__)


class Engine:
    """Serves a model on a machine: prefill and decode instances as peers.

    `generate` is for a list of prompts. `start`, then `submit` from any thread, is for requests that come and go.

    Args:
        model: from `cmjax.load`.
        supernode: the machine, by default the preset `cloudmatrix384`; or pools already carved (`cmjax.mesh.carve`).
        ep_size, prefill_ep_size, num_prefill_instances, num_decode_instances: see `cmjax.mesh.carve`.
        settings: sizes and formats.
        cache: of prefixes; None: nothing is cached.

    Raises:
        UserError: devices, experts or memory do not suffice, by number and setting; the cache's pool cannot be had.
    """

    def __init__(
        self,
        model: Model,
        supernode: Supernode | Pools | None = None,
        *,
        ep_size: int | None = None,
        prefill_ep_size: int | None = None,
        num_prefill_instances: int | None = None,
        num_decode_instances: int = 1,
        settings: EngineSettings | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        self._context = None
        if isinstance(supernode, Pools):
            self.pools = supernode
        else:
            self.pools = carve(
                supernode or Supernode.preset("cloudmatrix384"),
                ep_size=ep_size,
                prefill_ep_size=prefill_ep_size,
                num_prefill_instances=num_prefill_instances,
                num_decode_instances=num_decode_instances,
            )
        self.core = Core(Scheduler(self.settings.handoff_timeout_s))
        if self.pools.is_shared:
            self.core.device_lock = threading.RLock()
        if cache is not None and cache.enable_prefix_caching:
            self._context = open_context(model, self.settings, cache, self.pools.supernode.ranks_per_node)
        try:
            self.fleet = Fleet(model, self.pools, self.settings, self.core, self._context)
        except BaseException:
            if self._context is not None:
                self._context.close()
            raise
        self._ids = itertools.count()
        self._is_started = False
        self._startup: Startup | None = None
        self._closing = threading.Event()

    @property
    def pool(self) -> MemoryPool | None:
        """Where blocks of prefixes are stored; None where nothing is cached."""
        return None if self._context is None else self._context.pool

    @property
    def prefill(self) -> list[PrefillExecutor]:
        """The executors of the prefill instances."""
        return list(self.fleet.prefill.values())

    @property
    def decode(self) -> DecodeExecutor:
        """The executor of the first decode instance."""
        return next(iter(self.fleet.decode.values()))

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, progress: Callable[[StartProgress], None] | None = None, *, wait: bool = True) -> None:
        """Start the instances' threads and compile their steps.

        Args:
            progress: called with how far it is, from any thread.
            wait: until all steps are compiled, so that no request is served more slowly than any later one. False:
                until requests can be served; the other steps are compiled behind them, and where one cannot be, the
                log says why and requests go on without it.
        """
        if self._is_started:
            return
        self.fleet.start()
        startup = self._startup = Startup(self.fleet, progress or (lambda _: None))
        try:
            startup.compile_first()
            if wait:
                startup.compile_rest()
        except BaseException:
            startup.stop()
            self.fleet.stop()
            raise
        self._is_started = True
        if not wait:
            startup.compile_rest_behind(lambda error: logger.error("a step could not be compiled", exc_info=error))

    def shutdown(self, timeout: float | None = None) -> None:
        """Take no more requests, wait for those that run, at most `timeout` seconds, cancel the rest, and stop."""
        self._closing.set()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wait_until_idle(deadline)
        with self.core.changed:
            for request in list(self.core.handles):
                self.core.scheduler.cancel(request)
        self.core.deliver()
        if self._startup is not None:
            self._startup.stop()
        self.fleet.stop()
        if self._context is not None:
            self._context.close()
        self._is_started = False

    def _wait_until_idle(self, deadline: float | None) -> None:
        with self.core.changed:
            while self.core.handles and (deadline is None or time.monotonic() < deadline):
                self.core.changed.wait(0.1)

    def follow_load(self, policy: RatioPolicy, period_s: float = 1.0) -> None:
        """Ask a policy every `period_s` seconds whether a role should have more or fewer instances, and do what it
        says, until the engine shuts down. A change that fails is logged, and the policy asked again.

        Instances that join have as many devices as the first of their role.
        """
        sizes: dict[Role, int] = {"prefill": self.pools.prefill[0].ep_size, "decode": self.pools.decode[0].ep_size}

        def follow() -> None:
            while not self._closing.wait(period_s):
                try:
                    self._follow_once(policy, sizes)
                except Exception:
                    logger.exception("the number of instances could not follow the load")

        threading.Thread(target=follow, name="ratio", daemon=True).start()

    def _follow_once(self, policy: RatioPolicy, sizes: dict[Role, int]) -> None:
        can_add: dict[Role, bool] = {role: self.fleet.has_room(size) for role, size in sizes.items()}
        change = policy.decide(self.core.clock(), self.stats(), can_add)
        if change is not None and change.add is not None:
            self.fleet.add(change.add, sizes[change.add])
        elif change is not None and change.remove is not None:
            self.fleet.remove(change.remove)

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs, and each role has an instance that works."""
        return self.fleet.is_healthy

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        namespace: str = "",
        cache_salt: str = "",
    ) -> RequestHandle:
        """Take a request; returns at once, from any thread.

        Args:
            prompt_ids: at least one token.
            sampling: how to continue it.
            request_id: what messages call it; by default a number.
            priority: lower ones go first.
            tenant: waiting requests of one priority take turns by tenant.
            namespace: of the prefix cache; nothing is shared between namespaces.
            cache_salt: nothing is shared within a namespace between requests with different ones.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, a request that does not fit the cache, an engine
                that is shutting down.
        """
        name = request_id or f"request {next(self._ids)}"
        request = self._request(name, prompt_ids, sampling or SamplingParams(), namespace, cache_salt)
        request.priority, request.tenant = priority, tenant
        request.times = RequestTimes(self.core.clock())
        handle = RequestHandle(name, request.prompt_ids, request.times, lambda: self._cancel(request))
        with self.core.changed:
            if self._closing.is_set() or not self._is_started:
                raise UserError("the engine takes no requests: it has not been started, or is shutting down")
            self.core.handles[request] = handle
            self.core.scheduler.submit(request)
            self.core.changed.notify_all()
        self.core.deliver()
        return handle

    def _cancel(self, request: Request) -> None:
        with self.core.changed:
            self.core.scheduler.cancel(request)
            self.core.changed.notify_all()
        self.core.deliver()

    def _request(
        self, name: str, prompt: Sequence[int], sampling: SamplingParams, namespace: str = "", cache_salt: str = ""
    ) -> Request:
        """Check a prompt and make a request of it."""
        config, limit = self.model.config, self.settings.max_model_len
        ids = check_token_ids(token_id_array(prompt, name), config)
        if ids.ndim != 1 or not ids.size:
            raise UserError(f"{name} is {'empty' if ids.ndim == 1 else 'no list of token ids'}")
        # A prompt that is only scored may fill the cache: the one token after it is never put there.
        is_scored = sampling.prompt_logprobs is not None and sampling.max_tokens == 1
        if len(ids) + sampling.max_tokens > limit + is_scored:
            raise UserError(
                f"{name} of {len(ids)} tokens with max_tokens {sampling.max_tokens} exceeds max_model_len {limit}"
            )
        for field, tokens in _named_tokens(sampling).items():
            outside = [token for token in tokens if not 0 <= token < config.vocab_size]
            if outside:
                last = config.vocab_size - 1
                raise UserError(f"{name}: {field} of token {outside[0]}, outside the vocabulary (0 to {last})")
        for field in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, field) or 0) > config.vocab_size:
                raise UserError(
                    f"{name}: {field} {getattr(sampling, field)} exceed the vocabulary of {config.vocab_size}"
                )
        request = Request(name, ids.tolist(), sampling, model=self.model.digest)
        needed = blocks_for(request.num_tokens, self.settings.block_size)
        if needed > self.settings.num_decode_blocks:
            raise UserError(
                f"{name} needs {needed} cache blocks, a decode rank has {self.settings.num_decode_blocks}: raise "
                "num_kv_blocks"
            )
        if self._context is not None:
            request.chain = make_chain(self._context, namespace, cache_salt, request.prompt_ids)
        return request

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> GenerateResult:
        """Continue prompts of token ids; more of them than there are places wait for their turn.

        For an engine that has not been started.

        Args:
            prompts: lists of token ids, each at least one token.
            sampling: for all, or one each.
            progress: called with ("compile" | "prefill" | "decode", tokens so far, tokens in all).

        Raises:
            UserError: an empty prompt, a token id outside the vocabulary, a prompt that does not fit the cache.
        """
        if self._is_started:
            raise UserError("the engine has been started: submit its requests")
        sampling = SamplingParams() if sampling is None else sampling
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(params)} sampling params")
        pairs = zip(prompts, params, strict=True)
        requests = [self._request(f"prompt {index}", *pair) for index, pair in enumerate(pairs)]
        self.fleet.start()
        try:
            timings = run_to_end(self.core, self.fleet, requests, progress)
        except BaseException:
            self.fleet.stop()
            # What was under way is lost: start the next call afresh.
            self.fleet.restart()
            raise
        self.fleet.stop()
        prefill_load, decode_load = self.take_load()
        kept = self.core.scheduler.kept_drafts
        return GenerateResult([r.output() for r in requests], timings, prefill_load, decode_load, kept)

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks, those of the instances and of the pool; what requests under way use they keep."""
        with self.core.changed:
            for planner in self.core.scheduler.prefill.values():
                planner.cache.clear()
        if self._context is not None:
            self._context.pool.clear()

    def wait_until_stored(self) -> None:
        """Wait until the pool has all that requests have left for it so far, on disk too, or will never have it."""
        with self.core.changed:
            # What a thread that has ended had left to do is not done any more.
            while any(
                one.is_alive and (not one.planner.stores.is_idle or one.executor.expects_arrivals)
                for one in self.fleet.loops
            ):
                self.core.changed.wait(0.01)
        if self._context is not None:
            self._context.pool.flush()

    # -- what is counted ----------------------------------------------------------------------------------------------

    def take_load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return and forget the rows by logical expert since the last call: prefill's and decode's."""
        scheduler = self.core.scheduler
        with self.core.changed:
            prefill = [one.logical_load(scheduler.prefill[n].slot_load.take()) for n, one in self.fleet.prefill.items()]
            decode = [one.logical_load(scheduler.decode[n].slot_load.take()) for n, one in self.fleet.decode.items()]
        return np.sum(prefill, axis=0), np.sum(decode, axis=0)

    def expert_load(self) -> dict[Role, np.ndarray]:
        """Role -> the rows that its instances' routed experts have received in their last steps (see `SlotLoad`),
        `int64[moe layers, routed experts]`, the MTP module's layer last."""
        scheduler = self.core.scheduler
        with self.core.changed:
            prefill = [(one, scheduler.prefill[name].slot_load.recent) for name, one in self.fleet.prefill.items()]
            decode = [(one, scheduler.decode[name].slot_load.recent) for name, one in self.fleet.decode.items()]
        return {
            "prefill": np.sum([one.logical_load(rows) for one, rows in prefill], axis=0),
            "decode": np.sum([one.logical_load(rows) for one, rows in decode], axis=0),
        }

    def stats(self) -> EngineStats:
        """What the engine does at present, and what it has done since its start."""
        traffic: dict[str, int] = {}
        for entry in fabric.traffic.snapshot().entries:
            traffic[entry.plane] = traffic.get(entry.plane, 0) + entry.wire_bytes
        scheduler = self.core.scheduler
        with self.core.changed:
            kept = scheduler.kept_drafts
            num_drafts = len(kept) - 1
            accepted = [int(kept[place + 1 :].sum()) for place in range(num_drafts)]
            return EngineStats(
                instances=[one.stats() for one in scheduler.planners],
                num_waiting=len(scheduler.waiting),
                num_running=scheduler.num_running,
                num_preemptions=scheduler.num_preemptions,
                num_handoffs=scheduler.num_handoffs,
                num_failed_handoffs=scheduler.num_failed_handoffs,
                num_prompt_tokens=scheduler.num_prompt_tokens,
                num_generation_tokens=scheduler.num_generation_tokens,
                num_drafts=int(kept.sum()) if num_drafts else 0,
                num_draft_tokens=int(kept.sum()) * num_drafts,
                num_accepted_tokens=sum(accepted),
                num_accepted_tokens_per_pos=accepted,
                plane_bytes=traffic,
                cache=dataclasses.replace(scheduler.cache_counts),
            )


def _named_tokens(sampling: SamplingParams) -> dict[str, Iterable[int]]:
    """The fields that name token ids, and which they name."""
    return {
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
        "bad_words": (token for word in sampling.bad_words for token in word),
        "allowed_token_ids": sampling.allowed_token_ids or (),
    }
