"""How the steps of a server are compiled: first those that any request can be served with, the others behind it."""

import contextlib
import ctypes
import dataclasses
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor

from cmjax.mesh import programs_are_shared
from cmjax.schedule import DecodeVariant, Variant
from cmjax.serve.fleet import Fleet


@dataclasses.dataclass(frozen=True)
class StartProgress:
    """How far an engine is with its steps.

    Attributes:
        num_done, num_steps: steps that are compiled, and all.
        newest: the one that has been compiled last, such as "decode0: 8 sequences a rank"; "" before the first.
        elapsed_s: since the beginning.
        left_s: estimate from the steps so far; None before the first.
    """

    num_done: int
    num_steps: int
    newest: str
    elapsed_s: float
    left_s: float | None

    def __str__(self) -> str:
        left = "" if self.left_s is None or self.num_done == self.num_steps else f", about {self.left_s:.0f} s left"
        newest = f" ({self.newest})" if self.newest else ""
        return f"compiled {self.num_done} of {self.num_steps} steps{newest} in {self.elapsed_s:.0f} s{left}"


class Startup:
    """Brings the instances of a fleet to where they take requests, and then to their full speed.

    An instance can do with one step, the smallest that knows all that clients may ask for: long prompts are computed
    by it in several parts, and few sequences decode together. `compile_first` compiles that of each instance, and what
    hands latents over; `compile_rest` compiles the others, while requests are served.

    Args:
        fleet: its threads run.
        tell: called with how far it is, from any thread.
        clock: seconds.
    """

    def __init__(
        self, fleet: Fleet, tell: Callable[[StartProgress], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet, self._tell, self._clock = fleet, tell, clock
        executors = fleet.executors
        # One of each kind first: what it traces, lowers and compiles the others need not, where they come later.
        self._kinds = {name: (one.role, one.spec) for name, one in executors.items()}
        firsts = {kind: name for name, kind in reversed(self._kinds.items())}
        names = sorted(executors, key=lambda name: firsts[self._kinds[name]] != name)
        self._steps = {name: in_order(executors[name].serving_variants()) for name in names}
        self._turns: defaultdict[Hashable, threading.Lock] = defaultdict(threading.Lock)  # by kind and step
        self._lock = threading.Lock()
        self._num_done = 0
        self._is_stopped = False
        self._begin = clock()
        self._thread: threading.Thread | None = None

    def compile_first(self) -> None:
        """Compile a step of each instance, and let them take requests.

        Raises:
            BaseException: what made one fail.
        """
        self._report("")
        self._on_all(lambda name: self._compile(name, self._steps[name][:1]))
        self._fleet.compile_handoff()
        self._fleet.open_for_serving()

    def compile_rest(self) -> None:
        """Compile the others; each is used from then on. Raises as `compile_first` does."""
        self._on_all(lambda name: self._compile(name, self._steps[name][1:]))
        _give_memory_back()

    def compile_rest_behind(self, on_error: Callable[[BaseException], None]) -> None:
        """The same in a thread of its own; `on_error` is told what made it fail."""

        def run() -> None:
            try:
                self.compile_rest()
            except BaseException as error:
                if not self._is_stopped:
                    on_error(error)

        self._thread = threading.Thread(target=run, name="compile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Compile no more; returns when the steps under way are done, for XLA cannot be interrupted."""
        self._is_stopped = True
        if self._thread is not None:
            self._thread.join()

    def _on_all(self, work: Callable[[str], None]) -> None:
        """Do it for every instance, some at a time; what makes one fail does not keep the others from it."""
        workers = min(len(self._steps), max(os.cpu_count() or 1, 2))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="compile")
        try:
            errors = [done.exception() for done in [pool.submit(work, name) for name in self._steps]]
        except BaseException:
            self._is_stopped = True  # somebody wants to go, and what is under way cannot be interrupted
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        for error in filter(None, errors):
            raise error

    def _compile(self, name: str, variants: Iterable[Variant]) -> None:
        for variant in variants:
            try:
                with self._turn(name, variant):
                    executor = self._fleet.executors.get(name)
                    if self._is_stopped or executor is None:
                        return  # it has been taken out meanwhile
                    executor.prepare(variant)
                self._fleet.use(name, variant)
            except Exception:  # whatever stopped it: of an instance that is gone nobody needs the step
                if name not in self._fleet.executors:
                    return
                raise
            with self._lock:
                self._num_done += 1
            self._report(f"{name}: {described(variant)}")

    def _turn(self, name: str, variant: Variant) -> contextlib.AbstractContextManager[object]:
        """Of an instance at a step: one at a time of a kind where the others find what it compiles, else any."""
        if not programs_are_shared(self._kinds[name][1].mesh):
            return contextlib.nullcontext()
        with self._lock:
            return self._turns[self._kinds[name], variant]

    def _report(self, newest: str) -> None:
        with self._lock:
            num_done, num_steps = self._num_done, sum(map(len, self._steps.values()))
            elapsed_s = self._clock() - self._begin
            # Instances compile side by side: what is left takes as long as it has taken so far, step by step.
            left_s = elapsed_s / num_done * (num_steps - num_done) if num_done else None
            progress = StartProgress(num_done, num_steps, newest, elapsed_s, left_s)
        self._tell(progress)


def _give_memory_back() -> None:
    """Have the C library return what compilation has freed; glibc keeps it otherwise, and others have no need of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_order(variants: Iterable[Variant]) -> list[Variant]:
    """Steps by how soon they are needed: what knows all that clients may ask for, first the smallest, then the largest,
    which computes the most together, then those between; then what is quicker for some of the requests."""
    ascending = list(variants)
    sizes = [size_of(one) for one in ascending]
    shapes = list(dict.fromkeys(one.sampling for one in ascending))

    def need(one: Variant) -> tuple[int, int, int]:
        place = [min(sizes), max(sizes)].index(size_of(one)) if size_of(one) in (min(sizes), max(sizes)) else 2
        return -shapes.index(one.sampling), place, size_of(one)

    return sorted(ascending, key=need)


def size_of(variant: Variant) -> int:
    """Tokens of a prefill step, sequences a rank of a decode call."""
    return variant.num_slots if isinstance(variant, DecodeVariant) else variant.num_tokens


def described(variant: Variant) -> str:
    """For people."""
    kind = "any sampling" if variant.sampling.is_sampled else "greedy"
    if isinstance(variant, DecodeVariant):
        return f"{variant.num_slots} sequence{'s' * (variant.num_slots > 1)} a rank, {kind}"
    return f"{variant.num_tokens:,} tokens, {kind}"
