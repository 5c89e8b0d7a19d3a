"""The rules of the layout, kept by reading the sources (nothing here runs the package)."""

import ast
import io
import re
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "cmjax").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

# From the lowest up: a room imports itself and those before it, never one after it, not even for a type. A folder that
# has a line of its own is a room, the rest of the folder it is in another one.
ROOMS = (
    "errors",
    "options",
    "schedule",
    "text",
    "api",
    "loops",
    "native",
    "mesh",
    "kernels",
    "quant",
    "moe",
    "model",
    "training",
    "checkpoint",
)
ROOMS += ("serve.settings", "serve.caching", "serve.steps", "serve.transfer", "serve.instances", "serve", "serve.http")
ROOMS += ("targets", "perf", "bench", "cli")
# The package's own front door, which imports lazily, counts as the highest room it imports; `__main__` starts `cli`.
FRONT_DOOR = "cmjax"
START = "cmjax.__main__"

# Decisions and descriptions that the scheduler, the simulator and the tests share: no arrays, no JAX.
WITHOUT_JAX = ("errors.py", "options.py", "mesh/planes.py", "mesh/topology.py", "moe/placement.py", "moe/eplb.py")
WITHOUT_JAX += tuple(
    f"{room}/{path.name}" for room in ("schedule", "text", "api") for path in (ROOT / "cmjax" / room).glob("*.py")
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")

COLLECTIVES = ("all_to_all", "ragged_all_to_all", "all_gather", "psum", "psum_scatter", "ppermute", "pmean", "pmax")
COLLECTIVES += ("pmin", "pshuffle", "pswapaxes", "pbroadcast")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 9  # `self` not counted


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


TREES = {module: parse(path) for module, path in MODULES.items()}


def parents(module: str) -> list[str]:
    """`cmjax.moe.router` is in `cmjax` and `cmjax.moe`."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def room_of(module: str) -> str:
    """`cmjax.moe.router` is in `moe`, `cmjax.serve.steps.decode` in `serve.steps`, `cmjax.serve.loop` in `serve`."""
    for name in (module, *parents(module)[::-1]):
        if (room := name.removeprefix("cmjax.")) in ROOMS:
            return room
    raise AssertionError(f"{module} is in no room")


def named_modules(tree: ast.AST, known: Collection[str] = MODULES) -> Iterator[str]:
    """Every module a file names in an import; `from a import b` is a.b where that is one of our modules, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f".{node.module or ''}" if node.level else node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in known else base


def with_front_doors(name: str, importer: str) -> list[str]:
    """Importing a module also runs the front doors of the packages it is in, where the importer is not in them too."""
    return [name, *(package for package in parents(name) if package not in (importer, *parents(importer)))]


def imports(tree: ast.AST, importer: str, known: Collection[str] = MODULES) -> set[str]:
    """Modules of ours that a file imports, in functions and for types as well, with their front doors."""
    names = {one for name in named_modules(tree, known) for one in with_front_doors(name, importer)}
    return {name for name in names if name in known}


def module_level_imports(tree: ast.Module) -> Iterator[str]:
    """Those that run when the module does: not inside a function, not for the type checker only."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            yield from named_modules(node)


def find_cycle(edges: Mapping[str, Collection[str]]) -> list[str]:
    """The modules of an import cycle, the first one twice; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for name in sorted(edges[module]):
                if cycle := visit(name, [*trail, module]):
                    return cycle
            done.add(module)
        return []

    return next((cycle for module in sorted(edges) if (cycle := visit(module, []))), [])


def cycle_of(sources: Mapping[str, str]) -> list[str]:
    return find_cycle({module: imports(ast.parse(source), module, sources) for module, source in sources.items()})


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


def rank_of(module: str) -> int:
    if module == FRONT_DOOR:
        return max(ROOMS.index(room_of(name)) for name in imports(TREES[module], module))
    return ROOMS.index(room_of(module))


def upward_imports(tree: ast.Module, importer: str) -> Iterator[str]:
    yield from (f"relative import {name}" for name in named_modules(tree) if name.startswith("."))
    if importer not in (FRONT_DOOR, START):
        for name in sorted(imports(tree, importer)):
            if name == START or rank_of(name) > rank_of(importer):
                yield f"{room_of(importer)} imports {name}"


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


def many_parameters(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            count = sum(one is not None and one.arg not in ("self", "cls") for one in every)
            if count > MAX_PARAMETERS:
                yield f"{node.name}: {count} parameters"


def classes_in(trees: Iterable[ast.Module]) -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    found = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
    return {name: one for name, one in found.items() if not name.startswith("__")}


def is_abstract(node: ast.ClassDef) -> bool:
    names = [dotted(base).split(".")[-1] for base in node.bases]
    decorators = [dotted(one) for method in methods(node).values() for one in method.decorator_list]
    return bool({"ABC", "Protocol"} & set(names)) or any(one.endswith("abstractmethod") for one in decorators)


def overridden_methods(tree: ast.Module, known: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    """Methods of ours that a class replaces, where the class that has them is used as it is."""
    for name, node in classes_in([tree]).items():
        for base in (known.get(dotted(one).split(".")[-1]) for one in node.bases):
            if base is not None and not is_abstract(base):
                yield from (f"{name} overrides {base.name}.{one}" for one in methods(node) if one in methods(base))


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
    """What brings JAX in when `module` and what it imports are run, front doors of other packages included."""
    seen.add(module)
    for name in module_level_imports(TREES[module]):
        if name.split(".")[0] in JAX:
            yield f"{module} imports {name}"
        for one in with_front_doors(name, module):
            if one in MODULES and one not in seen and one != FRONT_DOOR:
                yield from jax_behind(one, seen)


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


BAD = {
    "upward": ("def f():\n  from cmjax.serve import Engine", lambda tree: upward_imports(tree, "cmjax.moe.layer")),
    "upward cli": ("import cmjax.cli.info", lambda tree: upward_imports(tree, "cmjax.serve.engine")),
    "upward in a room": (
        "from cmjax.serve.instances import DecodeExecutor",
        lambda tree: upward_imports(tree, "cmjax.serve.transfer.wire"),
    ),
    "upward, front door": ("import cmjax", lambda tree: upward_imports(tree, "cmjax.moe.layer")),
    "relative": ("from . import x", lambda tree: upward_imports(tree, "cmjax.moe.layer")),
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
    "parameters": ("def f(a, b, c, d, e, /, g, *h, i, j, **k): ...", many_parameters),
    "overridden": (
        "class A:\n  def f(self): ...\nclass B(A):\n  def f(self): ...",
        lambda tree: overridden_methods(tree, classes_in([tree])),
    ),
}
GOOD = {
    "downward": (
        "from cmjax.mesh import fabric\nfrom cmjax.schedule import Role",
        lambda tree: upward_imports(tree, "cmjax.moe.layer"),
    ),
    "fabric": ("from cmjax.mesh import fabric\nfabric.psum(1, 'ep')", raw_collectives),
    "index": ("import jax\njax.lax.axis_index('ep')", raw_collectives),
    "platform": ("import sys, platform\nplatform.machine(), sys.platform", platform_questions),
    "short": ("def f():\n" + "  x = 1\n" * (MAX_FUNCTION_LINES - 1), long_functions),
    "front door": ("import cmjax", lambda tree: upward_imports(tree, "cmjax.serve.http.app")),
    "parameters": ("class A:\n  def f(self, a, b, c, d, e, f, g, *, h, i): ...", many_parameters),
    "abstract": (
        "import abc\nclass A(abc.ABC):\n  def f(self): ...\nclass B(A):\n  def f(self): ...",
        lambda tree: overridden_methods(tree, classes_in([tree])),
    ),
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


CLASSES = classes_in(TREES.values())


@pytest.mark.parametrize("path", relative(PACKAGE))
def test_package_file(path):
    """All rules over one file of the package; each line of the message is one breach."""
    file = ROOT / path
    tree, source = parse(file), file.read_text(encoding="utf-8")
    module = module_of(file)
    room = "cli" if module in (FRONT_DOOR, START) else room_of(module)
    breaches = [*upward_imports(tree, module), *global_statements(tree), *long_functions(tree), *many_parameters(tree)]
    breaches += overridden_methods(tree, CLASSES)
    breaches += ignores_without_reason(source)
    is_fabric = path.startswith(("cmjax/mesh/fabric", "cmjax/mesh/native"))
    # The benchmark of the fabric runs `lax` beside it on purpose.
    if not is_fabric and path != "cmjax/bench/fabric.py":
        breaches += raw_collectives(tree)
    if room not in ("native", "mesh", "kernels") or (room == "mesh" and not is_fabric):
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
    assert {"cmjax.mesh.topology", "cmjax.schedule.scheduler", "cmjax.api.worker"} <= set(present)
    breaches = [breach for module in present for breach in jax_behind(module, set())]
    assert not breaches, "\n".join(breaches)
    assert list(jax_behind("cmjax.mesh.devices", set()))


def test_no_import_cycles():
    cycle = find_cycle({module: imports(tree, module) for module, tree in TREES.items()})
    assert not cycle, "import cycle: " + " -> ".join(cycle)


@pytest.mark.parametrize(
    "sources",
    [
        {"cmjax.a": "import cmjax.b", "cmjax.b": "def f():\n  from cmjax.a import g"},
        {"cmjax.a": "from cmjax import b", "cmjax.b": "if TYPE_CHECKING:\n  from cmjax.a import g"},
        {
            "cmjax.a": "from cmjax.p.x import f",
            "cmjax.p": "import cmjax.p.y",
            "cmjax.p.x": "",
            "cmjax.p.y": "import cmjax.a",
        },
        {"cmjax.p": "from cmjax.p.x import f", "cmjax.p.x": "from cmjax.p import g"},
    ],
    ids=["in a function", "for types", "by a front door", "one's own front door"],
)
def test_a_cycle_is_found(sources):
    assert cycle_of(sources)


def test_a_package_is_no_cycle():
    assert not cycle_of(
        {"cmjax.p": "import cmjax.p.x", "cmjax.p.x": "import cmjax.p.y", "cmjax.p.y": "import cmjax.q", "cmjax.q": ""}
    )


@pytest.mark.parametrize("path", relative(TESTS))
def test_every_test_file_holds_tests(path):
    assert list(named_tests(parse(ROOT / path)))
