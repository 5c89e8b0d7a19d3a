"""Orbax checkpoints: a model saved as it is in memory, whole or not at all, and restored onto any devices.

A checkpoint is a folder with `config.json` (published style), `params/` (orbax) and `cmjax.json` (the digest, and that
of each file). It gets its name only when all three are written.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from cmjax.errors import UserError
from cmjax.model import ModelConfig, Params, abstract_params, aligned_empty, named_leaves, params_digest, quant_mode
from cmjax.quant import QUANT_MODES, QuantMode
from cmjax.text import read_json

_MANIFEST, _PARAMS = "cmjax.json", "params"
_FORMAT = 1

Shardings = jax.sharding.Sharding | Callable[[Params[jax.ShapeDtypeStruct]], Params[jax.sharding.Sharding]]


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder that `save` completed."""
    return (Path(path) / _MANIFEST).is_file()


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error, and is removed otherwise.

    Raises UserError where `path` already holds something. Interrupted at any moment, it leaves nothing called `path`.
    """
    folder = Path(path).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; a checkpoint is saved to a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot create this folder: {error.strerror}") from error
    try:
        # mkdtemp's own folder is private, which the checkpoint should not be.
        (partial / "whole").mkdir()
        yield partial / "whole"
        os.replace(partial / "whole", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(path: str | Path, config: ModelConfig, params: Params) -> str:
    """Write a checkpoint to the new folder `path`, whole or not at all; returns its digest.

    Leaves may be numpy arrays or jax arrays on any devices. Raises UserError where `path` already holds something, or
    `params` are not those of `config`.
    """
    import orbax.checkpoint as ocp  # half a second, which only those who use these checkpoints should pay

    _check_fit(config, params)
    with new_folder(path) as folder:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / _PARAMS, named_leaves(params))
        (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
        digest = params_digest(config, params)
        manifest = {"format": _FORMAT, "digest": digest, "quant": quant_mode(params), "files": _file_digests(folder)}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return digest


def _check_fit(config: ModelConfig, params: Params) -> None:
    found = named_leaves(params)
    wanted = named_leaves(abstract_params(config, params.embed.dtype, quant=quant_mode(params), **_stored(found)))
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        raise UserError(f"parameter {odd[0]} is {'missing' if odd[0] in wanted else 'not one of the config'}")
    for name, like in wanted.items():
        if found[name].shape != like.shape or found[name].dtype != like.dtype:
            raise UserError(
                f"parameter {name} is {np.dtype(found[name].dtype).name}{list(found[name].shape)}; the config wants "
                f"{like.dtype.name}{list(like.shape)}"
            )


def _stored(names: Iterable[str]) -> dict[str, Any]:
    """What a config does not say of the tree whose leaves are called `names`; see `build_params`."""
    names = set(names)
    quantized = {name.removesuffix(".qvalue") for name in names if name.endswith(".qvalue")}
    return {"mtp_head": "mtp.head" in names, "mtp_embed": "mtp.embed" in names, "quantized": quantized}


def _file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` but the manifest, by its path."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def digest(name: str) -> str:
        with open(folder / name, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    names = [name for name in names if name != _MANIFEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def restore(
    path: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> tuple[ModelConfig, Params, str]:
    """Config, parameters and digest of the checkpoint at `path`.

    Args:
        dtype: what norms and router (always float32) do not have; None: as saved.
        sharding: None for numpy arrays on 64-byte boundaries; one sharding for every leaf; or a function from the
            abstract parameters (`jax.ShapeDtypeStruct` leaves) to the tree of their shardings, over any mesh.

    The digest is that of what is returned. Raises UserError where the folder is not a whole checkpoint, or a file is
    not as it was saved.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    digest, quant = _verified(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / _PARAMS).item_metadata.tree
        abstract = abstract_params(config, stored["embed"].dtype, quant=quant, **_stored(stored))
        args = _restore_args(ocp, abstract, sharding)
        values = checkpointer.restore(folder / _PARAMS, restore_args=args)
    target = abstract if dtype is None else abstract_params(config, dtype, quant=quant, **_stored(stored))
    # Each leaf is popped: beside the result there is one leaf as it came.
    leaves = [_placed(values.pop(name), like.dtype) for name, like in named_leaves(target).items()]
    params = jax.tree.unflatten(jax.tree.structure(target), leaves)
    if target.embed.dtype != abstract.embed.dtype:
        digest = params_digest(config, params)
    return config, params, digest


def _verified(folder: Path) -> tuple[str, QuantMode | None]:
    """The digest of the checkpoint in `folder` and its quantization, once its files are what was saved.

    Before orbax sees them: it meets a damaged file with tracebacks from several threads.
    """
    if not is_checkpoint(folder):
        raise UserError(f"{folder}: not a checkpoint that cmjax saved ({_MANIFEST} is missing)")
    manifest = read_json(folder / _MANIFEST)
    version, digest, files = (manifest.get(key) for key in ("format", "digest", "files"))
    if version != _FORMAT:
        raise UserError(f"{folder}: checkpoint format {version!r} is not supported; supported: {_FORMAT}")
    if not isinstance(digest, str) or not isinstance(files, dict):
        raise UserError(f"{folder / _MANIFEST}: digest or files are missing")
    quant = manifest.get("quant")
    if quant not in (None, *QUANT_MODES):
        raise UserError(f"{folder / _MANIFEST}: quant {quant!r} is not supported; supported: {', '.join(QUANT_MODES)}")
    try:
        found = _file_digests(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot read this checkpoint: {error}") from error
    for name, expected in files.items():
        if found.get(name) != expected:
            state = "has changed since it was saved" if name in found else "is missing"
            raise UserError(f"{folder / name}: this file of the checkpoint {state}")
    return digest, quant


def _restore_args(
    ocp: ModuleType, abstract: Params[jax.ShapeDtypeStruct], sharding: Shardings | None
) -> dict[str, object]:
    names = named_leaves(abstract)
    if sharding is None:
        return {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    if isinstance(sharding, jax.sharding.Sharding):
        return {name: ocp.ArrayRestoreArgs(sharding=sharding) for name in names}
    chosen = named_leaves(sharding(abstract))
    return {name: ocp.ArrayRestoreArgs(sharding=chosen[name]) for name in names}


def _placed(leaf: jax.Array | np.ndarray, dtype: np.dtype) -> jax.Array | np.ndarray:
    """`leaf` in `dtype`: a jax array where it is, a numpy array on a 64-byte boundary."""
    if not isinstance(leaf, np.ndarray):
        return leaf.astype(dtype)
    if leaf.dtype == dtype and leaf.ctypes.data % 64 == 0:
        return leaf
    copy = aligned_empty(leaf.shape, dtype)
    copy[...] = leaf
    return copy
