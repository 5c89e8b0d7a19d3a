"""What the API needs of an engine."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cmjax.model import Model
from cmjax.schedule import EngineStats, Role, SamplingParams
from cmjax.serve import EngineSettings, RequestHandle
from cmjax.serve.caching import MemoryPool


class Backend(Protocol):
    """An engine that has been started: `cmjax.serve.Engine`, or another one that takes requests and says how it is."""

    @property
    def model(self) -> Model:
        """What it serves; its config has the vocabulary and the tokens that end a text."""
        ...

    @property
    def settings(self) -> EngineSettings:
        """Its sizes; `max_model_len` is the longest request."""
        ...

    @property
    def pool(self) -> MemoryPool | None:
        """Where blocks of prompts are kept; None where there is no prefix cache."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether requests have a chance."""
        ...

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
        """Take a request; see `Engine.submit`."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all that is cached; may take a while."""
        ...

    def stats(self) -> EngineStats:
        """What it does at present."""
        ...

    def expert_load(self) -> dict[Role, np.ndarray]:
        """Rows by routed expert, of late; see `Engine.expert_load`."""
        ...
