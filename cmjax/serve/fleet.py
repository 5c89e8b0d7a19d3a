"""The instances of an engine: brought up, added, drained and removed while requests run."""

import itertools
import time
from collections.abc import Iterable
from typing import TypeVar

import jax

from cmjax.errors import UserError
from cmjax.mesh import Instance, Pools
from cmjax.model import Model
from cmjax.schedule import CompilePlan, InstanceChange, RestartPlan, Role, Scheduler, SloController, Variant
from cmjax.serve.caching.context import ContextCache
from cmjax.serve.core import Core
from cmjax.serve.instances import DecodeExecutor, PrefillExecutor
from cmjax.serve.instances.memory import check_caches_fit
from cmjax.serve.loop import InstanceLoop
from cmjax.serve.settings import EngineSettings
from cmjax.serve.transfer import Wire

Placed = TypeVar("Placed", PrefillExecutor, DecodeExecutor)


class Fleet:
    """Instances by name. What is here changes with the core's lock held only.

    Attributes:
        prefill, decode: their executors.
        loops: all of them at work, prefill first.
    """

    def __init__(
        self,
        model: Model,
        pools: Pools,
        settings: EngineSettings,
        core: Core,
        context: ContextCache | None = None,
    ) -> None:
        self.model, self.pools, self.settings, self.core = model, pools, settings, core
        self._context = context
        sizes = [(one, self._num_blocks(one.role)) for one in pools.instances]
        check_caches_fit(model.config, settings, sizes, model.dtype)
        self._wire = Wire()
        self._instances = {one.name: one for one in (*pools.prefill, *pools.decode)}
        self.prefill = {one.name: self._place_prefill(one) for one in pools.prefill}
        self.decode = {one.name: self._place_decode(one) for one in pools.decode}
        self._numbers = {"prefill": itertools.count(len(pools.prefill)), "decode": itertools.count(len(pools.decode))}
        self._loops: dict[str, InstanceLoop] = {}
        self._used: dict[str, set[Variant]] = {}  # of a server's steps, those that an instance has been given
        self._is_running = False
        self.renew()

    @property
    def executors(self) -> dict[str, PrefillExecutor | DecodeExecutor]:
        """All by name, prefill first."""
        return {**self.prefill, **self.decode}

    @property
    def loops(self) -> list[InstanceLoop]:
        """All instances at work, prefill first."""
        return list(self._loops.values())

    @property
    def is_healthy(self) -> bool:
        """Whether each role has an instance that works."""
        with self.core.changed:
            works = {one.planner.role for one in self.loops if one.is_alive and not one.planner.is_lost}
        return works == {"prefill", "decode"}

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all threads, with new bookkeeping."""
        self.renew()
        with self.core.changed:
            self._is_running = True
            for loop in self.loops:
                loop.start()

    def stop(self) -> None:
        """End all threads after the plans under way."""
        with self.core.changed:
            self._is_running = False
            for loop in self.loops:
                loop.stop()
        for loop in self.loops:
            loop.join()

    def restart(self) -> None:
        """Forget all that the instances hold; their threads have ended."""
        self.core.scheduler = Scheduler(self.settings.handoff_timeout_s)
        for executor in self.executors.values():
            executor.run(RestartPlan())
        self.renew()

    def compile(self, plans: dict[str, CompilePlan]) -> None:
        """Have instances compile, all at the same time, and wait until they have.

        Raises:
            BaseException: what made one fail.
        """
        with self.core.changed:
            changes = [self._loops[name].planner.change(plan) for name, plan in plans.items()]
            self.core.changed.notify_all()
        self._wait_for(changes)
        for change in changes:
            if change.error is not None:
                raise change.error

    def use(self, name: str, variant: Variant) -> None:
        """Have an instance use one more of a server's steps beside those that it has; raises as `compile` does.

        Only one at a time for each instance.
        """
        with self.core.changed:
            known = self._used.setdefault(name, set())
            known.add(variant)
            variants = tuple(one for one in self.executors[name].serving_variants() if one in known)
        try:
            self.compile({name: CompilePlan(variants)})
        except BaseException:
            known.discard(variant)
            raise

    def compile_handoff(self) -> None:
        """Have all prefill instances compile what sends to the decode instances."""
        self.compile({name: CompilePlan((), tuple(self.decode)) for name in self.prefill})

    def open(self) -> None:
        """Let all instances take requests."""
        with self.core.changed:
            for loop in self.loops:
                loop.planner.is_compiled = True

    def open_for_serving(self) -> None:
        """Let all instances take requests that come and go."""
        with self.core.changed:
            for loop in self.loops:
                self._open(loop)

    # -- instances that come and go -----------------------------------------------------------------------------------

    def has_room(self, ep_size: int) -> bool:
        """Whether so many neighbouring devices are free."""
        with self.core.changed:
            return self._find_ranks(ep_size) is not None

    def add(self, role: Role, ep_size: int) -> str:
        """Bring up an instance on devices that no other has, compile its steps, and let it take part.

        Returns:
            Its name.

        Raises:
            UserError: no such devices are free, or its cache does not fit.
            Exception: what made it fail; nothing is left of it.
        """
        instance = self._claim_devices(role, ep_size)
        name, sizes = instance.name, [(instance, self._num_blocks(role))]
        try:
            check_caches_fit(self.model.config, self.settings, sizes, self.model.dtype)
            executor = self._place_prefill(instance) if role == "prefill" else self._place_decode(instance)
            with self.core.changed:
                if executor.role == "prefill":
                    self.prefill[name] = executor
                else:
                    self.decode[name] = executor
                loop = self._make_loop(name, executor)
                if not self._is_running:
                    return name  # it starts with the others
                loop.start()
                targets = tuple(self.decode) if role == "prefill" else ()
            self.compile({name: CompilePlan(executor.serving_variants(), targets)})
            if role == "decode":
                self._compile_sends(name)
        except BaseException:
            self._take_out(name)
            raise
        with self.core.changed:
            if self._loops.get(name) is not loop:
                raise UserError(f"{name} has been taken out before it was ready")
            self._open(loop)
            self.core.scheduler.admit()
            self.core.changed.notify_all()
        return name

    def drain(self, name: str) -> None:
        """Give an instance nothing new; what it has it finishes.

        Raises:
            UserError: there is no such instance, or no other of its role is ready.
        """
        with self.core.changed:
            planner = self._loop(name).planner
            others = [one for one in self.core.scheduler.of_role(planner.role) if one is not planner]
            if not any(one.is_compiled and not one.is_draining and not one.is_lost for one in others):
                raise UserError(f"{name} is the last {planner.role} instance that takes requests")
            planner.is_draining = True

    def remove(self, name: str, timeout: float | None = None) -> None:
        """Drain an instance and take it out; its devices are free after that.

        Args:
            name: of the instance.
            timeout: seconds to wait for what it has under way; what is left then starts over from its tokens elsewhere.
        """
        self.drain(name)
        planner = self._loop(name).planner
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.core.changed:
            while not planner.is_idle and (deadline is None or time.monotonic() < deadline):
                self.core.changed.wait(0.1)
        self._take_out(name)

    # -- inside -------------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """New bookkeeping for all instances, whose threads do not run: nothing is held."""
        scheduler = self.core.scheduler
        for loop in self.loops:
            if loop.planner.is_broken:
                loop.executor.run(RestartPlan())
        with self.core.changed:
            self._loops, self._used = {}, {}
            scheduler.prefill.clear()
            scheduler.decode.clear()
            for name, executor in self.executors.items():
                self._make_loop(name, executor)

    def _make_loop(self, name: str, executor: PrefillExecutor | DecodeExecutor) -> InstanceLoop:
        planner = executor.make_planner(name, self.core.scheduler)
        loop = self._loops[name] = InstanceLoop(self.core, planner, executor)
        return loop

    def _take_out(self, name: str) -> None:
        """Whatever there is of an instance; its requests start over elsewhere."""
        with self.core.changed:
            loop = self._loops.get(name)
            if loop is not None and (name in self.prefill or name in self.decode):
                loop.stop()
                self.core.scheduler.remove(name)
            self.prefill.pop(name, None)
            self.decode.pop(name, None)
        self.core.deliver()
        if loop is not None:
            loop.join()
        self._wire.unregister(name)
        with self.core.changed:
            self._loops.pop(name, None)
            self._instances.pop(name, None)  # its devices are free from now on

    def _num_blocks(self, role: str) -> int:
        return self.settings.num_prefill_blocks if role == "prefill" else self.settings.num_decode_blocks

    def _place_prefill(self, instance: Instance) -> PrefillExecutor:
        num_blocks = self._num_blocks("prefill")
        executor = PrefillExecutor(self.model, instance, self.settings, num_blocks, self._wire, self._context)
        return self._with_news(executor)

    def _with_news(self, executor: Placed) -> Placed:
        if executor.caching is not None:
            executor.caching.port.on_news = self.core.wake
        return executor

    def _place_decode(self, instance: Instance) -> DecodeExecutor:
        executor = DecodeExecutor(
            self.model,
            instance,
            self.settings,
            self._num_blocks("decode"),
            self._wire,
            self._context,
            num_redundant_experts=self.settings.num_redundant_experts,
            num_shared_replicas=self.settings.num_shared_replicas,
        )
        self._wire.register(instance.name, executor)
        return self._with_news(executor)

    def _open(self, loop: InstanceLoop) -> None:
        """An instance whose steps are compiled takes part; with the lock held."""
        if loop.name in self.core.scheduler.decode and self.settings.tpot_slo_ms is not None:
            planner = self.core.scheduler.decode[loop.name]
            sizes = sorted({one.num_slots for one in self.decode[loop.name].serving_variants()})
            planner.controller = SloController(self.settings.tpot_slo_ms / 1e3, sizes)
        loop.planner.is_compiled = True

    def _compile_sends(self, target: str) -> None:
        """Have every prefill instance that stays compile what sends to a new decode instance."""
        with self.core.changed:
            changes = [(one, one.change(CompilePlan((), (target,)))) for one in self.core.scheduler.prefill.values()]
            self.core.changed.notify_all()
        for planner, change in changes:
            self._wait_for([change])
            if change.error is not None and not (planner.is_lost or planner.is_closed):
                raise change.error

    def _wait_for(self, changes: Iterable[InstanceChange]) -> None:
        """Wait until all of them are over, done or not."""
        with self.core.changed:
            for change in changes:
                while not change.is_over:
                    self.core.changed.wait(0.1)

    def _loop(self, name: str) -> InstanceLoop:
        if name not in self._loops:
            raise UserError(f"there is no running instance {name}; there are {', '.join(self._loops) or 'none'}")
        return self._loops[name]

    def _claim_devices(self, role: Role, ep_size: int) -> Instance:
        with self.core.changed:
            first_rank = self._find_ranks(ep_size)
            if first_rank is None:
                raise UserError(f"no {ep_size} neighbouring devices are free for another {role} instance")
            devices = tuple(jax.devices()[first_rank : first_rank + ep_size])
            name = f"{role}{next(self._numbers[role])}"
            instance = self._instances[name] = Instance(name, role, devices, first_rank)
        return instance

    def _find_ranks(self, ep_size: int) -> int | None:
        """The first of `ep_size` neighbouring ranks that no instance has; None where there are none."""
        taken = {rank for one in self._instances.values() for rank in one.ranks}
        num_ranks = min(self.pools.supernode.num_ranks, len(jax.devices()))
        free = 0
        for rank in range(num_ranks):
            free = 0 if rank in taken else free + 1
            if free == ep_size:
                return rank - ep_size + 1
        return None
