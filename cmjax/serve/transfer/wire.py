"""The rounds of hand-offs on their way between the executors of one process."""

import dataclasses
import threading
from collections import OrderedDict, defaultdict
from typing import Any, Protocol

import jax

from cmjax.mesh import Instance
from cmjax.model import Model
from cmjax.schedule import Arrival
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import StepSpec

# What stands for the parts of ranks that get nothing in a round: latents and hidden states of each rank.
IdleParts = tuple[list[jax.Array], list[jax.Array]]


class Holder(Protocol):
    """An executor whose cache holds latents: what a hand-off needs of either side."""

    model: Model
    instance: Instance
    settings: EngineSettings
    spec: StepSpec
    num_places: int
    cache: jax.Array


class Receiver(Holder, Protocol):
    """The executor that a hand-off goes to."""

    hidden: jax.Array | None
    idle_parts: IdleParts | None


@dataclasses.dataclass(frozen=True)
class Payload:
    """One round of a hand-off on its way: for every decode rank at most so many tokens.

    Attributes:
        latents: `[decode ranks, layers, tokens, width]`, on the decode devices, perhaps not yet there.
        hidden: `[decode ranks * places, hidden]`, the last hidden states of the prompts that end.
    """

    latents: jax.Array
    hidden: jax.Array

    @property
    def is_ready(self) -> bool:
        """Whether it has arrived."""
        arrays: tuple[Any, ...] = (self.latents, self.hidden)  # their stub lacks `is_ready`
        return all(array.is_ready() for array in arrays)


class Wire:
    """The rounds on their way between the executors of one process, by the one they go to. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, Receiver] = {}
        self._rounds: dict[Receiver, OrderedDict[Arrival, Payload]] = defaultdict(OrderedDict)
        self._known: dict[Receiver, set[Arrival]] = defaultdict(set)

    def register(self, name: str, receiver: Receiver) -> None:
        """Rounds can be sent to it by name."""
        with self._lock:
            self._receivers[name] = receiver

    def unregister(self, name: str) -> None:
        """It has been taken out, if it was there."""
        with self._lock:
            receiver = self._receivers.pop(name, None)
            if receiver is not None:
                self._drop(receiver)

    def receiver(self, name: str) -> Receiver:
        """An executor by name.

        Raises:
            RuntimeError: it has been taken out.
        """
        with self._lock:
            return self._receiver(name)

    def put(self, name: str, key: Arrival, payload: Payload) -> None:
        """A round is on its way."""
        with self._lock:
            self._rounds[self._receiver(name)][key] = payload

    def arrived(self, receiver: Receiver) -> list[Arrival]:
        """Rounds that have arrived since the last call, in the order they were sent."""
        with self._lock:
            known, found = self._known[receiver], []
            for key, payload in self._rounds[receiver].items():
                if key not in known and payload.is_ready:
                    found.append(key)
            known |= set(found)
        return found

    def is_expected(self, receiver: Receiver) -> bool:
        """Whether rounds are on their way that have not arrived."""
        with self._lock:
            return len(self._rounds[receiver]) > len(self._known[receiver])

    def take(self, receiver: Receiver, key: Arrival) -> Payload:
        """A round that has arrived."""
        with self._lock:
            self._known[receiver].discard(key)
            return self._rounds[receiver].pop(key)

    def clear(self, receiver: Receiver) -> None:
        """Throw away what is on its way to one."""
        with self._lock:
            self._drop(receiver)

    def _receiver(self, name: str) -> Receiver:
        if name not in self._receivers:
            raise RuntimeError(f"there is no decode instance {name}")
        return self._receivers[name]

    def _drop(self, receiver: Receiver) -> None:
        self._rounds.pop(receiver, None)
        self._known.pop(receiver, None)
