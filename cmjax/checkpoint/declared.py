"""What a `quantization_config` declares of a tensor: that it is quantized, that it is a float, or nothing certain."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, final

from cmjax.errors import UserError

Form = Literal["quantized", "float", "either"]

_PATTERN = "re:"
_META = re.compile(r"[\\^$*+?|()\[\]{}]")
# What makes a module's last name a linear layer of attention or FFN, which every implementation counts as such.
_LINEAR = re.compile(r"(_proj|_proj_with_mqa)$")
# Experts that a checkpoint keeps stacked, in tensors that are no module's `weight`.
_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
# Those that some implementations count among the linear layers, and others do not.
_OPEN = frozenset({"eh_proj", "lm_head", "head", "gate"})


@dataclass(frozen=True)
class Declared:
    """The form of one tensor, and where the config says so, for messages."""

    form: Form
    why: str


@final
@dataclass(frozen=True)
class ModuleNames:
    """A list of a config that names modules: exact paths, `re:` and what a path must begin with, or (`parts`) any run
    of whole components of a path, and patterns without `re:`."""

    entries: frozenset[str]
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = field(repr=False)
    parts: bool

    @classmethod
    def read(cls, where: str, stated: object, *, parts: bool = False) -> "ModuleNames":
        """From what `config.json` has at `where`; UserError unless it is a list of names, or null."""
        entries = [] if stated is None else stated
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"config: {where} must be a list of module names, got {stated!r}")
        patterns = []
        for entry in dict.fromkeys(entries):
            marked = entry.startswith(_PATTERN)
            if not marked and not (parts and _META.search(entry)):
                continue
            # Without the mark, as transformers reads it, but never "layers.1" for "layers.10".
            text = entry.removeprefix(_PATTERN) if marked else rf"(?:{entry})(?:\.|$)"
            try:
                patterns.append((entry, re.compile(text)))
            except re.error as error:
                raise UserError(f"config: {where}: {entry!r} is not a valid pattern: {error}") from error
        return cls(frozenset(entries), tuple(patterns), parts)

    def find(self, module: str) -> str | None:
        """The entry that names the module."""
        named = _runs(module) if self.parts else (module,)
        exact = next((name for name in named if name in self.entries), None)
        return exact or next((entry for entry, pattern in self.patterns if pattern.match(module)), None)


def _runs(module: str) -> Iterator[str]:
    """Every run of whole components of a dotted path, the path itself first."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            yield ".".join(parts[start : start + length])


def _module(name: str) -> str | None:
    """The module that the tensor is the matrix of; None for biases and norms, which are floats in every format."""
    module = name.removesuffix(".weight")
    is_matrix = module != name and not module.endswith("norm")
    return module if is_matrix or _STACKED.search(name) else None


def _class(module: str) -> str:
    last = module.rpartition(".")[2]
    if _STACKED.search(module):
        return "Experts"
    return "Linear" if last in _OPEN or _LINEAR.search(last) else "Embedding" if last == "embed_tokens" else ""


def _by_class(module: str) -> Form:
    return "either" if module.rpartition(".")[2] in _OPEN else "quantized"


@final
@dataclass(frozen=True)
class CompressedModules:
    """compressed-tensors: what the `targets` of a group name, by path, pattern or class, less what `ignore` names."""

    targets: ModuleNames
    ignore: ModuleNames

    def of(self, name: str) -> Declared:
        """What is declared of the tensor called `name`."""
        module = _module(name)
        if module is None:
            return Declared("float", "only matrices are quantized")
        ignored = self.ignore.find(module)
        if ignored is not None:
            return Declared("float", f"quantization_config.ignore lists {ignored!r}")
        target, kind = self.targets.find(module), _class(module)
        if kind in self.ignore.entries:
            return Declared("float", f"quantization_config.ignore lists {kind!r}")
        if target is not None:
            return Declared("quantized", f"the targets of quantization_config list {target!r}, and ignore does not")
        if kind in self.targets.entries:
            why = f"the targets of quantization_config list {kind!r}, and ignore does not name {module}"
            return Declared(_by_class(module), why)
        return Declared("float", f"no target of quantization_config names {module}")


@final
@dataclass(frozen=True)
class Fp8Modules:
    """FP8 configs: every linear layer but what `modules_to_not_convert` or `ignored_layers` names."""

    skipped: tuple[ModuleNames, ...]

    def of(self, name: str) -> Declared:
        """What is declared of the tensor called `name`."""
        module = _module(name)
        if module is None:
            return Declared("float", "only matrices are quantized")
        entry = next(filter(None, (names.find(module) for names in self.skipped)), None)
        if entry is not None:
            return Declared("float", f"quantization_config lists {entry!r} as not converted")
        if _class(module) == "Embedding":
            return Declared("float", "embeddings are not converted")
        return Declared(_by_class(module), f"quantization_config does not list {module} as not converted")
