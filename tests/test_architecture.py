"""The rules of the layout, kept by reading the sources (nothing here runs the package)."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "cmjax").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

# From the lowest up: a room imports itself and those before it, never one after it, not even for a type.
ROOMS = ("errors", "options", "schedule", "loops", "mesh", "quant", "moe", "model", "training", "checkpoint")
ROOMS += ("serve", "perf", "bench", "cli")
# The package's front door hands out names of `model` lazily, and `__main__` starts `cli`.
ABOVE_ALL = ("__init__", "__main__")

# Decisions and descriptions that the scheduler, the simulator and the tests share: no arrays, no JAX.
WITHOUT_JAX = ("errors.py", "options.py", "mesh/planes.py", "mesh/topology.py", "moe/placement.py", "moe/eplb.py")
WITHOUT_JAX += tuple(f"schedule/{path.name}" for path in (ROOT / "cmjax" / "schedule").glob("*.py"))
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")

COLLECTIVES = ("all_to_all", "ragged_all_to_all", "all_gather", "psum", "psum_scatter", "ppermute", "pmean", "pmax")
COLLECTIVES += ("pmin", "pshuffle", "pswapaxes", "pbroadcast")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

Finding = Callable[[ast.Module], Iterator[str]]


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE}


def room_of(module: str) -> str:
    """`cmjax.moe.router` is in `moe`, `cmjax.cli.info` in `cli`, `cmjax` itself in `__init__`."""
    name = [*module.split("."), "__init__"][1]
    return "cli" if name.startswith("cli") else name


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module a file names in an import; `from a import b` is a.b where that is one of our modules, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f".{node.module or ''}" if node.level else node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def module_level_imports(tree: ast.Module) -> Iterator[str]:
    """Those that run when the module does: not inside a function, not for the type checker only."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            yield from imports(node)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names_used(tree: ast.Module) -> Iterator[str]:
    """Dotted names and `from` imports, as `jax.lax.psum` or `lax.psum`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward_imports(tree: ast.Module, room: str) -> Iterator[str]:
    for module in imports(tree):
        if module.startswith("."):
            yield f"relative import {module}"
        elif module.split(".")[0] == "cmjax" and room not in ABOVE_ALL:
            target = room_of(module)
            if target not in ABOVE_ALL and ROOMS.index(target) > ROOMS.index(room):
                yield f"{room} imports {module}"


def raw_collectives(tree: ast.Module) -> Iterator[str]:
    for name in names_used(tree):
        *_, owner, attribute = ["", "", *name.split(".")]
        if owner == "lax" and attribute in COLLECTIVES:
            yield name


def ffi_uses(tree: ast.Module) -> Iterator[str]:
    yield from (name for name in names_used(tree) if re.match(r"jax\.(extend\.)?ffi\b", name))


def platform_questions(tree: ast.Module) -> Iterator[str]:
    for name in names_used(tree):
        last = name.split(".")[-1]
        is_question = last in ("default_backend", "platform_dependent") or (last == "platform" and "." in name)
        if is_question and name != "sys.platform":
            yield name


def prints(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield f"print on line {node.lineno}"


def global_statements(tree: ast.Module) -> Iterator[str]:
    yield from (f"line {node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Global))


def long_functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name}: {length} lines"


def named_tests(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from named_tests(ast.Module(node.body, []))


def ignores_without_reason(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_ignore = token.type == tokenize.COMMENT and "type: ignore" in token.string
        if is_ignore and not re.search(r"type: ignore\[[\w, -]+\]\s+#\s*\w{3}", token.string):
            yield f"line {token.start[0]}: {token.string}"


def jax_behind(module: str, seen: set[str]) -> Iterator[str]:
    """What brings JAX in when `module` and those it imports by name are run, apart from package front doors."""
    seen.add(module)
    for name in module_level_imports(parse(MODULES[module])):
        if name.split(".")[0] in JAX:
            yield f"{module} imports {name}"
        elif name in MODULES and name not in seen and name != "cmjax":
            yield from jax_behind(name, seen)


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


BAD = {
    "upward": ("def f():\n  from cmjax.serve import Engine", lambda tree: upward_imports(tree, "moe")),
    "upward cli": ("import cmjax.cli.info", lambda tree: upward_imports(tree, "serve")),
    "relative": ("from . import x", lambda tree: upward_imports(tree, "moe")),
    "collective": ("import jax\njax.lax.psum(1, 'ep')", raw_collectives),
    "collective alias": ("from jax import lax\nlax.ppermute", raw_collectives),
    "collective import": ("from jax.lax import all_gather", raw_collectives),
    "ffi": ("import jax\njax.ffi.ffi_call", ffi_uses),
    "ffi import": ("from jax import ffi", ffi_uses),
    "platform": ("x.devices[0].platform == 'cpu'", platform_questions),
    "backend": ("import jax\njax.default_backend()", platform_questions),
    "print": ("print(1)", prints),
    "global": ("def f():\n  global x\n  x = 1", global_statements),
    "long": ("def f():\n" + "  x = 1\n" * MAX_FUNCTION_LINES, long_functions),
}
GOOD = {
    "downward": ("from cmjax.mesh import fabric\nimport cmjax", lambda tree: upward_imports(tree, "moe")),
    "fabric": ("from cmjax.mesh import fabric\nfabric.psum(1, 'ep')", raw_collectives),
    "index": ("import jax\njax.lax.axis_index('ep')", raw_collectives),
    "platform": ("import sys, platform\nplatform.machine(), sys.platform", platform_questions),
    "short": ("def f():\n" + "  x = 1\n" * (MAX_FUNCTION_LINES - 1), long_functions),
}


@pytest.mark.parametrize("case", BAD)
def test_each_rule_catches_its_breach(case):
    source, rule = BAD[case]
    assert list(rule(ast.parse(source)))


@pytest.mark.parametrize("case", GOOD)
def test_no_rule_cries_wolf(case):
    source, rule = GOOD[case]
    assert not list(rule(ast.parse(source)))


def test_ignore_rule():
    comment = "# type: " + "ignore"
    assert list(ignores_without_reason(f"x = 1  {comment}\ny = 2  {comment}[attr-defined]\n"))
    assert not list(ignores_without_reason(f"x = 1  {comment}[attr-defined]  # the stub lacks it\n"))


@pytest.mark.parametrize("path", relative(PACKAGE))
def test_package_file(path):
    """All rules over one file of the package; each line of the message is one breach."""
    file = ROOT / path
    tree, source = parse(file), file.read_text(encoding="utf-8")
    room = room_of(module_of(file))
    assert room in ROOMS + ABOVE_ALL
    breaches = [*upward_imports(tree, room), *global_statements(tree), *long_functions(tree)]
    breaches += ignores_without_reason(source)
    is_fabric = path.startswith(("cmjax/mesh/fabric", "cmjax/mesh/native"))
    # The benchmark of the fabric runs `lax` beside it on purpose.
    if not is_fabric and path != "cmjax/bench/fabric.py":
        breaches += raw_collectives(tree)
    if not is_fabric:
        breaches += ffi_uses(tree)
    if room != "mesh":
        breaches += platform_questions(tree)
    if room not in ("cli", "bench"):
        breaches += prints(tree)
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        breaches.append(f"{num_lines} lines; at most {MAX_FILE_LINES}")
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("path", relative(SCRIPTS + TESTS))
def test_other_file(path):
    tree, source = parse(ROOT / path), (ROOT / path).read_text(encoding="utf-8")
    breaches = [*global_statements(tree), *long_functions(tree), *ignores_without_reason(source)]
    assert not breaches, "\n".join(breaches)


def test_policy_modules_do_not_import_jax():
    present = [f"cmjax.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__") for name in WITHOUT_JAX]
    present = [module for module in present if module in MODULES]
    assert {"cmjax.mesh.topology", "cmjax.schedule", "cmjax.schedule.scheduler"} <= set(present)
    breaches = [breach for module in present for breach in jax_behind(module, set())]
    assert not breaches, "\n".join(breaches)
    assert list(jax_behind("cmjax.mesh.devices", set()))


def test_no_import_cycles():
    edges = {
        module: {name for name in module_level_imports(parse(path)) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join((*trail, module))
        if module not in done:
            for name in sorted(edges[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("path", relative(TESTS))
def test_every_test_file_holds_tests(path):
    assert list(named_tests(parse(ROOT / path)))
