"""The other side of `cmjax bench peer`: the same weights in llama.cpp, by the C functions of llama-cpp-python.

Run by an interpreter that has llama-cpp-python and gguf, through `side.py`: this file imports nothing of cmjax.
"""

import ctypes
import itertools
import os
import runpy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_DEFAULT_UBATCH = 512  # llama.cpp's own
_PAD = 256  # cells of a sequence's cache are counted in these

_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h

_errors: list[str] = []


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _: object) -> None:
    """llama.cpp tells of every tensor; only its errors are wanted, and only where something fails."""
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


class _Batch:
    """Token ids of sequences at positions from `start` on, as llama_decode takes them."""

    def __init__(self, ids: np.ndarray, start: int, *, every: bool = False) -> None:
        count, length = ids.shape
        self.num_outputs = count * (length if every else 1)
        self.batch = llama_cpp.llama_batch_init(ids.size, 0, 1)
        self.batch.n_tokens = ids.size
        self.tokens = np.ctypeslib.as_array(self.batch.token, (ids.size,))
        self.positions = np.ctypeslib.as_array(self.batch.pos, (ids.size,))
        self.tokens[:] = ids.reshape(-1)
        self.positions[:] = np.tile(np.arange(start, start + length), count)
        np.ctypeslib.as_array(self.batch.logits, (ids.size,))[:] = np.tile(
            np.arange(length) >= (0 if every else length - 1), count
        )
        for index in range(ids.size):
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = index // length

    def __del__(self) -> None:
        llama_cpp.llama_batch_free(self.batch)


class _Context:
    """A cache for sequences of one length, and how llama.cpp is to compute over it."""

    def __init__(self, model: Any, vocab_size: int, shape: tuple[int, int], **way: Any) -> None:
        """`shape` is (sequences, tokens of each); `way` is one of `_ways`, with the type of the cache."""
        count, length = shape
        params = llama_cpp.llama_context_default_params()
        cells = count * length if way["unified"] else count * (-(-length // _PAD) * _PAD)
        params.n_ctx = -(-cells // _PAD) * _PAD
        params.n_batch = count * length
        params.n_ubatch = min(way["ubatch"], count * length)
        params.n_seq_max = count
        params.n_threads = params.n_threads_batch = num_threads()
        params.kv_unified = way["unified"]
        params.type_k = params.type_v = way["cache_type"]
        params.flash_attn_type = int(way["flash"])
        params.offload_kqv = params.op_offload = False  # on the CPU, whatever the build has
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(_failure("no context"))
        self._vocab_size = vocab_size
        self._memory = llama_cpp.llama_get_memory(self._context)

    def forward(self, batch: _Batch) -> np.ndarray:
        """Logits of the tokens that want them, `float32[outputs, V]`: a view, until the next call."""
        status = llama_cpp.llama_decode(self._context, batch.batch)
        if status:
            raise RuntimeError(_failure(f"llama_decode gave {status}"))
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (batch.num_outputs, self._vocab_size))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def crop(self, length: int) -> None:
        """Forget what lies behind the first `length` tokens of every sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, length, -1)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)


class Side:
    """A loaded model, and the job it has been prepared for; the methods are the requests."""

    def __init__(self) -> None:
        llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model: Any = None
        self._vocab_size = 0
        self._cache_type = llama_cpp.GGML_TYPE_F16
        self._flash: tuple[bool, ...] = (False, True)
        self._context: _Context | None = None
        self._job: Callable[[], np.ndarray] | None = None
        self._tokens = np.zeros(0, np.int64)

    def versions(self) -> dict[str, str]:
        """Of the packages that the figures depend on, and for which instructions llama.cpp is built."""
        ggml = _ggml_version()
        features = llama_cpp.llama_print_system_info().decode()
        built = " ".join(name for name, value in _pairs(features) if value == "1")
        return {"llama-cpp-python": llama_cpp.__version__, "ggml": ggml, "llama.cpp is built with": built}

    def load(self, path: str, number_format: str) -> None:
        """Write the checkpoint in folder `path` as a GGUF file beside that folder, and load it."""
        self.close()  # before its file is written over
        file = Path(path).with_name("model.gguf")
        # By its path: the folder of this file is no package here, and must not shadow anybody's modules.
        write_gguf = runpy.run_path(str(Path(__file__).with_name("gguf_file.py")))["write_gguf"]
        write_gguf(path, str(file), number_format)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(_failure("the model does not load"))
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        is_float32 = number_format == "float32"
        self._cache_type = llama_cpp.GGML_TYPE_F32 if is_float32 else llama_cpp.GGML_TYPE_F16
        # Over a float32 cache too, its flash attention computes in less than float32: another model's logits.
        self._flash = (False,) if is_float32 else (False, True)

    def logits(self, input_ids: Sequence[Sequence[int]], into: str) -> None:
        """Save `float32[A, B, S, V]` to the file `into`: by each kind of attention that may be timed."""
        ids, found = np.array(input_ids), []
        for flash in self._flash:
            context = self._new_context(ids.shape, flash=flash, unified=False, ubatch=_DEFAULT_UBATCH)
            found.append(context.forward(_Batch(ids, 0, every=True)).reshape(*ids.shape, -1).copy())
            context.close()
        np.save(into, np.stack(found))

    def prepare(self, job: str, prompts: Sequence[Sequence[int]], num_steps: int) -> str:
        """Make `run` do the job over `prompts[B, S]`; return the way of llama.cpp that does it fastest."""
        ids = np.array(prompts)
        self._drop_context()
        best: tuple[float, dict[str, Any]] | None = None
        for way in _ways(job, ids.size, self._flash):
            seconds = self._try(job, ids, num_steps, way)
            if best is None or seconds < best[0]:
                best = seconds, way
        assert best is not None  # there are always ways
        self._job = self._start(job, ids, num_steps, best[1])
        return _name(best[1], job)

    def run(self) -> None:
        """Do the job once."""
        if self._job is None:
            raise RuntimeError("nothing is prepared")
        self._tokens = self._job()

    def tokens(self, into: str) -> None:
        """Save what the last run made, `int64[B, tokens]`, to the file `into`."""
        np.save(into, self._tokens)

    def close(self) -> None:
        """Free the model."""
        self._drop_context()
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = None

    def _try(self, job: str, ids: np.ndarray, num_steps: int, way: dict[str, Any]) -> float:
        """Seconds of one job done so, the better of two after one to get warm."""
        call, seconds = self._start(job, ids, num_steps, way), []
        call()
        for _ in range(2):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        self._drop_context()
        return min(seconds)

    def _start(self, job: str, ids: np.ndarray, num_steps: int, way: dict[str, Any]) -> Callable[[], np.ndarray]:
        count, length = ids.shape
        self._context = context = self._new_context((count, length + (num_steps if job == "decode" else 0)), **way)
        prompts = _Batch(ids, 0)

        def prefill() -> np.ndarray:
            context.clear()
            return context.forward(prompts).argmax(-1)[:, None]

        if job == "prefill":
            return prefill
        first = prefill()
        step = _Batch(first, length)

        def decode() -> np.ndarray:
            step.tokens[:] = first[:, 0]
            made = np.empty((count, num_steps), np.int64)
            for index in range(num_steps):
                step.positions[:] = length + index
                made[:, index] = step.tokens[:] = context.forward(step).argmax(-1)
            context.crop(length)
            return made

        return decode

    def _new_context(self, shape: tuple[int, int], **way: Any) -> _Context:
        if not self._model:
            raise RuntimeError("no model is loaded")
        return _Context(self._model, self._vocab_size, shape, cache_type=self._cache_type, **way)

    def _drop_context(self) -> None:
        self._job = None
        if self._context is not None:
            self._context.close()
        self._context = None


def num_threads() -> int:
    """All cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ways(job: str, num_tokens: int, flash: Sequence[bool]) -> list[dict[str, Any]]:
    """The settings of llama.cpp that change how fast it is here; the fastest for a job stands for it."""
    ubatches = {_DEFAULT_UBATCH, num_tokens} if job == "prefill" and num_tokens > _DEFAULT_UBATCH else {_DEFAULT_UBATCH}
    ways = itertools.product(flash, (False, True), sorted(ubatches))
    return [dict(zip(("flash", "unified", "ubatch"), way, strict=True)) for way in ways]


def _name(way: dict[str, Any], job: str) -> str:
    parts = ["flash attention" if way["flash"] else "attention", "one cache" if way["unified"] else "a cache each"]
    return ", ".join(parts + ([f"{way['ubatch']} at a time"] if job == "prefill" else []))


def _ggml_version() -> str:
    """Version and commit of the library that computes."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    file = next((one for one in sorted(folder.glob("libggml-base.*")) if one.suffix in (".so", ".dylib")), None)
    if file is None:
        return "unknown"
    library = ctypes.CDLL(str(file))
    parts = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(library, name, None)  # older ones do not say
        if function is not None:
            function.restype = ctypes.c_char_p
            parts.append(function().decode())
    return " ".join(parts) or "unknown"


def _pairs(features: str) -> list[tuple[str, str]]:
    """`CPU : AVX = 1 | FMA = 0 |` -> [("AVX", "1"), ("FMA", "0")]."""
    entries = (entry.rpartition(":")[2].partition("=") for entry in features.split("|"))
    return [(name.strip(), value.strip()) for name, equals, value in entries if equals]


def _failure(what: str) -> str:
    return f"{what}: {_errors[-1]}" if _errors else what
