"""The other side of `cmjax bench peer`: a checkpoint in Hugging Face transformers.

Imported where torch and transformers are installed, and else run by an interpreter that has them, through `side.py`:
this file imports nothing of cmjax, so that one without JAX will do.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import transformers

Job = Literal["decode", "prefill"]

# The ways transformers has to run experts; the one that is fastest for a job stands for it. "batched_mm" copies an
# expert's weights for every row, which is out of the question for a prefill.
EXPERTS: dict[Job, tuple[str, ...]] = {
    "decode": ("grouped_mm", "batched_mm", "eager"),
    "prefill": ("grouped_mm", "eager"),
}


class Side:
    """A loaded model, and the job it has been prepared for; the methods are the requests."""

    def __init__(self) -> None:
        self._model: Any = None
        self._cache_name = ""
        self._job: Callable[[], object] | None = None

    def versions(self) -> dict[str, str]:
        """Of the packages that the figures depend on."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def load(self, path: str, number_format: str) -> None:
        """Load the checkpoint in folder `path`."""
        dtype = getattr(torch, number_format)
        with _quiet():
            self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        # Renamed in transformers 5.24.
        is_new = "cache" in inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if is_new else "past_key_values"

    def logits(self, input_ids: Sequence[Sequence[int]], into: str) -> None:
        """Save `float32[1, B, S, V]` to the file `into`."""
        with torch.inference_mode():
            np.save(into, self._model(torch.tensor(input_ids)).logits.float().numpy()[None])

    def prepare(self, job: Job, prompts: Sequence[Sequence[int]], num_steps: int) -> str:
        """Make `run` do the job over `prompts[B, S]`; return the expert implementation that does it fastest."""
        ids, seconds = torch.tensor(prompts), {}
        for experts in EXPERTS[job]:
            call = self._call(job, ids, num_steps, experts)
            call()
            begin = time.perf_counter()
            call()
            seconds[experts] = time.perf_counter() - begin
        best = min(seconds, key=lambda name: seconds[name])
        self._job = self._call(job, ids, num_steps, best)
        return best

    def run(self) -> None:
        """Do the job once."""
        if self._job is None:
            raise RuntimeError("nothing is prepared")
        self._job()

    def _forward(self, ids: Any, cache: Any) -> Any:
        output = self._model(ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return output.logits.argmax(-1)

    def _call(self, job: Job, ids: Any, num_steps: int, experts: str) -> Callable[[], object]:
        def prefill() -> object:
            self._model.set_experts_implementation(experts)
            with torch.inference_mode():
                return self._forward(ids, transformers.DynamicCache(config=self._model.config))

        if job == "prefill":
            return prefill
        cache = transformers.DynamicCache(config=self._model.config)
        self._model.set_experts_implementation(EXPERTS["prefill"][0])
        with torch.inference_mode():
            first = self._forward(ids, cache)

        def decode() -> object:
            self._model.set_experts_implementation(experts)
            token = first
            with torch.inference_mode():
                for _ in range(num_steps):
                    token = self._forward(token, cache)
                cache.crop(-num_steps)
            return token

        return decode


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and remarks while transformers loads."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
