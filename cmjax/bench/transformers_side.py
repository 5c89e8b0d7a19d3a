"""The other side of `cmjax bench peer`: a checkpoint in Hugging Face transformers.

Imported where torch and transformers are installed, and else run by an interpreter that has them: this file imports
nothing of cmjax, so that one without JAX will do. As a program it answers requests, a JSON object a line.
"""

import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
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


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@dataclasses.dataclass
class TransformersModel:
    """A loaded model, and the job it has been prepared for."""

    model: Any
    cache_name: str
    run: Callable[[], object] | None = None

    @classmethod
    def load(cls, path: str, dtype: str) -> "TransformersModel":
        """Load the checkpoint at `path` in `dtype`."""
        with _quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        # Renamed in transformers 5.24.
        is_new = "cache" in inspect.signature(model.forward).parameters
        return cls(model, "cache" if is_new else "past_key_values")

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """`float32[B, S, V]`."""
        with torch.inference_mode():
            return self.model(torch.from_numpy(input_ids)).logits.float().numpy()

    def prepare(self, job: Job, prompts: np.ndarray, num_steps: int) -> str:
        """Make `run` do the job over `prompts int64[B, S]`; return the expert implementation that does it fastest."""
        seconds = {}
        for experts in EXPERTS[job]:
            call = self._call(job, prompts, num_steps, experts)
            call()
            begin = time.perf_counter()
            call()
            seconds[experts] = time.perf_counter() - begin
        best = min(seconds, key=lambda name: seconds[name])
        self.run = self._call(job, prompts, num_steps, best)
        return best

    def _forward(self, ids: Any, cache: Any) -> Any:
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return output.logits.argmax(-1)

    def _call(self, job: Job, prompts: np.ndarray, num_steps: int, experts: str) -> Callable[[], object]:
        ids = torch.from_numpy(prompts)

        def prefill() -> object:
            self.model.set_experts_implementation(experts)
            with torch.inference_mode():
                return self._forward(ids, transformers.DynamicCache(config=self.model.config))

        if job == "prefill":
            return prefill
        cache = transformers.DynamicCache(config=self.model.config)
        self.model.set_experts_implementation(EXPERTS["prefill"][0])
        with torch.inference_mode():
            first = self._forward(ids, cache)

        def decode() -> object:
            self.model.set_experts_implementation(experts)
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


def answer(state: TransformersModel | None, request: dict[str, Any]) -> tuple[TransformersModel | None, Any]:
    """Do one request: the model from now on, and what to reply."""
    match request:
        case {"do": "versions"}:
            return state, versions()
        case {"do": "load", "path": path, "dtype": dtype}:
            return TransformersModel.load(path, dtype), None
        case {"do": "logits", "input_ids": ids, "into": file} if state:
            np.save(file, state.logits(np.array(ids)))
            return state, None
        case {"do": "prepare", "job": job, "prompts": prompts, "num_steps": num_steps} if state:
            return state, state.prepare(job, np.array(prompts), num_steps)
        case {"do": "run"} if state and state.run:
            state.run()
            return state, None
    raise ValueError(f"cannot do {request.get('do')!r} now")


def main() -> None:
    """Answer the requests on standard input; only replies go to standard output."""
    replies, sys.stdout = sys.stdout, sys.stderr
    state: TransformersModel | None = None
    for line in sys.stdin:
        state, reply = answer(state, json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
