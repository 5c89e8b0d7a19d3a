"""The instances of an engine and their threads: brought up, added, drained and removed while requests run."""

import itertools
import time
from collections.abc import Callable

import jax

from cmjax.errors import UserError
from cmjax.mesh import Instance, Pools
from cmjax.model import Model
from cmjax.serve.core import Core
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.prefill_instance import PrefillInstance
from cmjax.serve.request import MAX_LOGPROBS
from cmjax.serve.sampling import SamplingRoom
from cmjax.serve.settings import EngineSettings, check_caches_fit
from cmjax.serve.slo import SloController
from cmjax.serve.stats import Role
from cmjax.serve.workers import DecodeWorker, PrefillWorker, Worker, warm_up_handoff

# What a server's steps are compiled for: greedy requests alone, and whatever else a client may ask for.
SERVING_ROOMS = (
    SamplingRoom(),
    SamplingRoom(
        is_sampled=True,
        num_bias=16,
        num_stop=8,
        has_penalties=True,
        num_logprobs=MAX_LOGPROBS,
        num_prompt_logprobs=MAX_LOGPROBS,
    ),
)


class Fleet:
    """Instances by name, and while the engine runs a thread for each.

    Attributes:
        instances: all there are.
        prefill, decode: their threads; empty while none run.
    """

    def __init__(self, model: Model, pools: Pools, settings: EngineSettings, core: Core) -> None:
        self.model, self.pools, self.settings, self.core = model, pools, settings, core
        sizes = [(one.ep_size, self._num_blocks(one.role)) for one in pools.instances]
        check_caches_fit(model.config, settings, sizes, model.dtype)
        self.instances = {one.name: self._place(one) for one in pools.instances}
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self._numbers = {role: itertools.count(len(some)) for role, some in (("prefill", pools.prefill),)}
        self._numbers["decode"] = itertools.count(len(pools.decode))

    @property
    def prefill_instances(self) -> list[PrefillInstance]:
        """Those of the prefill role."""
        return [one for one in self.instances.values() if isinstance(one, PrefillInstance)]

    @property
    def decode_instances(self) -> list[DecodeInstance]:
        """Those of the decode role."""
        return [one for one in self.instances.values() if isinstance(one, DecodeInstance)]

    @property
    def workers(self) -> list[Worker]:
        """All threads, prefill first."""
        return [*self.prefill.values(), *self.decode.values()]

    @property
    def is_healthy(self) -> bool:
        """Whether each role has an instance that works."""
        return all(any(worker.is_alive() for worker in some.values()) for some in (self.prefill, self.decode))

    def start(self, num_steps: int, *, is_patient: bool = False) -> None:
        """Start a thread for each instance; `num_steps`, `is_patient`: see `DecodeWorker`."""
        for name, instance in self.instances.items():
            self._hire(name, instance, num_steps, is_patient=is_patient)
        with self.core.changed:
            for worker in self.workers:
                worker.rejoin()
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """End all threads after the steps under way."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join()

    def reset(self) -> None:
        """Forget all that the instances hold; their threads have ended."""
        for instance in self.instances.values():
            instance.reset()

    def compile_for_serving(self, tell: Callable[[str], None]) -> None:
        """Compile all that a server's requests can need."""
        tell("the steps")
        for task in [worker.compile_for_serving(SERVING_ROOMS) for worker in self.workers]:
            task.result()
        tell("the hand-off")
        warm_up_handoff(self.prefill, self.decode)
        with self.core.changed:
            for worker in self.workers:
                self._make_ready(worker)

    def has_room(self, ep_size: int) -> bool:
        """Whether so many neighbouring devices are free."""
        return self._find_ranks(ep_size) is not None

    def add(self, role: Role, ep_size: int) -> str:
        """Bring up an instance on devices that no other has, compile its steps, and let it take part.

        Returns:
            Its name.

        Raises:
            UserError: no such devices are free, or its cache does not fit.
        """
        first_rank = self._find_ranks(ep_size)
        if first_rank is None:
            raise UserError(f"no {ep_size} neighbouring devices are free for another {role} instance")
        devices = tuple(jax.devices()[first_rank : first_rank + ep_size])
        name = f"{role}{next(self._numbers[role])}"
        sizes = [(ep_size, self._num_blocks(role))]
        check_caches_fit(self.model.config, self.settings, sizes, self.model.dtype)
        instance = self.instances[name] = self._place(Instance(name, role, devices, first_rank))
        worker = self._hire(name, instance, self.settings.steps_per_call)
        with self.core.changed:
            worker.rejoin()
            self.core.scheduler.peer(name).status = "draining"  # takes nothing before it is compiled
        worker.start()
        worker.compile_for_serving(SERVING_ROOMS).result()
        own = {name: worker}
        warm_up_handoff(
            {
                n: one
                for n, one in (own if role == "prefill" else self.prefill).items()
                if isinstance(one, PrefillWorker)
            },
            {n: one for n, one in (own if role == "decode" else self.decode).items() if isinstance(one, DecodeWorker)},
        )
        with self.core.changed:
            self._make_ready(worker)
            self.core.scheduler.admit()
            self.core.changed.notify_all()
        return name

    def drain(self, name: str) -> None:
        """Give an instance nothing new; what it has it finishes.

        Raises:
            UserError: there is no such instance, or no other of its role is ready.
        """
        with self.core.changed:
            worker = self._worker(name)
            others = self.prefill if isinstance(worker, PrefillWorker) else self.decode
            if not any(self.core.scheduler.peer(one).status == "ready" for one in others if one != name):
                role = "prefill" if isinstance(worker, PrefillWorker) else "decode"
                raise UserError(f"{name} is the last {role} instance that takes requests")
            self.core.scheduler.peer(name).status = "draining"

    def remove(self, name: str, timeout: float | None = None) -> None:
        """Drain an instance and take it out; its devices are free after that.

        Args:
            name: of the instance.
            timeout: seconds to wait for what it has under way; what is left then starts over from its tokens elsewhere.
        """
        self.drain(name)
        worker, scheduler = self._worker(name), self.core.scheduler
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.core.changed:
            while not scheduler.is_idle(name) and (deadline is None or time.monotonic() < deadline):
                self.core.changed.wait(0.1)
        worker.stop()
        worker.join()
        with self.core.changed:
            scheduler.move_all(name)
            scheduler.forget(name)
            self.prefill.pop(name, None)
            self.decode.pop(name, None)
            del self.instances[name]
            scheduler.admit()
            self.core.publish()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _num_blocks(self, role: str) -> int:
        return self.settings.num_prefill_blocks if role == "prefill" else self.settings.num_decode_blocks

    def _place(self, instance: Instance) -> PrefillInstance | DecodeInstance:
        settings, num_blocks = self.settings, self._num_blocks(instance.role)
        if instance.role == "prefill":
            return PrefillInstance(self.model, instance, settings, num_blocks)
        return DecodeInstance(
            self.model,
            instance,
            settings,
            num_blocks,
            num_redundant_experts=settings.num_redundant_experts,
            num_shared_replicas=settings.num_shared_replicas,
        )

    def _hire(
        self, name: str, instance: PrefillInstance | DecodeInstance, num_steps: int, *, is_patient: bool = False
    ) -> Worker:
        if isinstance(instance, PrefillInstance):
            self.prefill[name] = PrefillWorker(name, self.core, instance, self.decode)
            return self.prefill[name]
        self.decode[name] = DecodeWorker(name, self.core, instance, num_steps, is_patient=is_patient)
        return self.decode[name]

    def _make_ready(self, worker: Worker) -> None:
        """An instance whose steps are compiled takes part; called with the lock held."""
        if isinstance(worker, DecodeWorker) and self.settings.tpot_slo_ms is not None:
            worker.controller = SloController(self.settings.tpot_slo_ms / 1e3, worker.instance.slot_counts)
        worker.rejoin()

    def _worker(self, name: str) -> Worker:
        worker = self.prefill.get(name) or self.decode.get(name)
        if worker is None:
            known = ", ".join([*self.prefill, *self.decode])
            raise UserError(f"there is no running instance {name}; there are {known or 'none'}")
        return worker

    def _find_ranks(self, ep_size: int) -> int | None:
        """The first of `ep_size` neighbouring ranks that no instance has; None where there are none."""
        taken = {rank for one in self.instances.values() for rank in one.instance.ranks}
        num_ranks = min(self.pools.supernode.num_ranks, len(jax.devices()))
        free = 0
        for rank in range(num_ranks):
            free = 0 if rank in taken else free + 1
            if free == ep_size:
                return rank - ep_size + 1
        return None
