"""The rules of the house that a machine can check; ARCHITECTURE.md says why they are there.

Each rule is a function from one module (or from all of them) to a list of faults. The rules run
over nbdfleece/, and each is shown here to catch a planted fault. It matches names, not types:
a method that is named like a ``@graph_code`` function raises a false alarm, so graph changes have
verbs of their own (insert_filter, replace_node).
"""

from __future__ import annotations

import ast
import graphlib
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms that it may import from, besides itself. daemon.py, the composition root, may all.
DOORS: dict[str, set[str]] = {
    "base": set(),
    "protocol": {"base"},
    "formats": {"base"},
    "datapath": {"base", "protocol"},
    "block": {"base", "protocol", "formats", "datapath"},
    "jobs": {"base", "block"},
    "server": {"base", "protocol", "datapath", "block"},
    "backup": {"base", "formats", "block"},
    "fleece": {"base", "block", "jobs", "server", "backup"},
    "control": {"base", "protocol", "block", "jobs", "server", "fleece"},
    "pki": {"base"},
    "cli": {"base", "protocol", "pki", "backup", "daemon", "storage_daemon"},
    "lifetime": set(),
    "__main__": {"cli"},
    "__init__": set(),
}
DOORS["daemon"] = DOORS["storage_daemon"] = set(DOORS) - {"cli", "__main__", "__init__"}

# Within an open door: (who imports, what it imports) that stays shut, and who is excepted.
NARROW = (
    ("nbdfleece.block", "nbdfleece.protocol", {"nbdfleece.block.drivers.nbd"}),
    ("nbdfleece.control", "nbdfleece.block.drivers", set[str]()),
    ("nbdfleece.control", "nbdfleece.protocol.nbd", set[str]()),
    ("nbdfleece.datapath", "nbdfleece.protocol.qmp", set[str]()),
    ("nbdfleece.server", "nbdfleece.protocol.qmp", set[str]()),
)

SILENT = {"base", "protocol", "formats"}  # no coroutine, no module that meets the outside world
NO_IO = {
    *("asyncio", "concurrent", "fcntl", "mmap", "multiprocessing", "os", "select", "selectors"),
    *("shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time"),
}
PURE = {"os.strerror"}  # a table look-up, whatever module it lives in

# Imports that may stand inside a function: (room, or * for any; module) and nothing else.
LAZY = {
    ("*", "cryptography"),  # plain serving runs with the standard library alone
    ("cli", "nbdfleece.daemon"),  # a client command does not load the whole server
    ("cli", "nbdfleece.storage_daemon"),  # likewise
    ("cli", "nbdfleece.pki"),  # loads cryptography
    ("cli", "nbdfleece.backup"),  # loads the graph
    ("cli", "readline"),  # touches the terminal when it is loaded
}

# Where `except Exception` may stand, in one function of each module. At the boundaries one request,
# one command, one job dies; the carriers hand the error on, whole, to whoever awaits the work. A
# handler that ends with a bare `raise` is clean-up and may stand anywhere.
BOUNDARIES = {
    "nbdfleece.datapath.pump",
    "nbdfleece.server.session",
    "nbdfleece.control.dispatch",
    "nbdfleece.jobs.job",
}
CARRIERS = {"nbdfleece.datapath.step", "nbdfleece.datapath.workers"}

LINES = {"module": 700, "function": 70, "hot_function": 150, "init": 25, "hot_init": 40}

TOP_LEVEL = {
    *("nbdfleece", "tests", "examples", "docs", "pyproject.toml", "Dockerfile", "LICENSE"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"),
}

# A path of somebody's machine, as in slash-home-slash-me; spelled so that it does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~}])/" + r"(?:work|root|home)(?![\w-])")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One module of the package, parsed."""

    name: str
    text: str

    @property
    def room(self) -> str:
        return [*self.name.split("."), "__init__"][1]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def code_lines(self) -> set[int]:
        """Numbers of the lines that hold code: not blank, not comment, not docstring."""
        layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
        layout |= {tokenize.DEDENT, tokenize.ENDMARKER}
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in layout:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node):
                lines.difference_update(span(node.body[0]))
        return lines

    @cached_property
    def imports(self) -> list[tuple[ast.stmt, str]]:
        """Every imported name as a full dotted name, with the statement it stands in."""
        found: list[tuple[ast.stmt, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = self.name.split(".")[: -node.level] if node.level else []
                start = ".".join([*above, *filter(None, [node.module])])
                found += [(node, f"{start}.{alias.name}") for alias in node.names]
        return found

    @cached_property
    def type_only(self) -> set[ast.stmt]:
        """Imports under ``if TYPE_CHECKING:``, which do not happen at run time."""
        return {
            inner
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
            if isinstance(inner, ast.Import | ast.ImportFrom)
        }


def span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def called_name(node: ast.expr) -> str:
    """Return the last name of `f`, `a.f`, `f(...)` or `a.f(...)`."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_marked(function: Function, mark: str) -> bool:
    return any(called_name(decorator) == mark for decorator in function.decorator_list)


def awaits(statements: list[ast.stmt]) -> Iterator[int]:
    """Yield the lines where these statements themselves may suspend."""
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        if isinstance(node, Function | ast.Lambda):
            continue  # its body runs some other time
        if isinstance(node, ast.Await | ast.AsyncWith | ast.AsyncFor):
            yield node.lineno
        pending += ast.iter_child_nodes(node)


# ------------------------------------------------------------------------ rules, module by module


def has_docstring(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield "no module docstring"


def imports_through_doors(module: Module) -> Iterator[str]:
    for node, name in module.imports:
        parts = name.split(".")
        if parts[0] != "nbdfleece" or name == "nbdfleece.__version__":
            continue
        room = [*parts, "__init__"][1]
        if room == module.room:
            continue
        if room not in DOORS.get(module.room, set()):
            yield f"line {node.lineno}: {module.room} may not import {name}"
        if any(is_private(part) for part in parts):
            yield f"line {node.lineno}: {name} is private to its room"
        for who, what, excepted in NARROW:
            shut = is_within(module.name, who) and is_within(name, what)
            if shut and not any(is_within(module.name, name) for name in excepted):
                yield f"line {node.lineno}: {module.name} may not import {name}"


def is_silent(module: Module) -> Iterator[str]:
    if module.room not in SILENT:
        return
    for node, name in module.imports:
        if name.split(".")[0] in NO_IO and name not in PURE:
            yield f"line {node.lineno}: {module.room} is silent and may not import {name}"
    for function in module.functions:
        if isinstance(function, ast.AsyncFunctionDef):
            yield f"line {function.lineno}: coroutine {function.name} in a silent room"


def imports_at_the_top(module: Module) -> Iterator[str]:
    inner = {child for function in module.functions for child in ast.walk(function)}
    for node, name in module.imports:
        allowed = any(room in ("*", module.room) and is_within(name, what) for room, what in LAZY)
        if node in inner and node not in module.type_only and not allowed:
            yield f"line {node.lineno}: import of {name} inside a function"


def has_good_size(module: Module) -> Iterator[str]:
    if len(module.code_lines) > LINES["module"]:
        yield f"{len(module.code_lines)} code lines, at most {LINES['module']}"
    for function in module.functions:
        kind = "hot_function" if module.room == "datapath" else "function"
        if function.name == "__init__":
            kind = "hot_init" if module.room == "datapath" else "init"
        size = len(module.code_lines.intersection(span(function)))
        if size > LINES[kind]:
            yield f"line {function.lineno}: {function.name} has {size} code lines > {LINES[kind]}"


def finally_is_synchronous(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Try | ast.TryStar):
            for line in awaits(node.finalbody):
                yield f"line {line}: await in a finally"


def atomic_is_atomic(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.With):
            continue
        if any(called_name(item.context_expr) == "atomic" for item in node.items):
            for line in awaits(node.body):
                yield f"line {line}: await inside atomic()"


def catches_named_errors(module: Module) -> Iterator[str]:
    owner = {child: scope.name for scope in module.functions for child in ast.walk(scope)}
    owners: set[str] = set()
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else "BaseException"
        last = node.body[-1]
        cleans_up = isinstance(last, ast.Raise) and last.exc is None
        if cleans_up or not re.search(r"\b(Base)?Exception\b", caught):
            continue
        owners.add(owner.get(node, "the module"))
        if module.name not in BOUNDARIES | CARRIERS:
            yield f"line {node.lineno}: except {caught} outside the boundary functions"
    if len(owners) > 1:
        yield f"except Exception in more than one function: {', '.join(sorted(owners))}"


def fast_has_a_twin(module: Module) -> Iterator[str]:
    """``# FAST:`` names the plain form in tests/reference/, in its own comment block."""
    for block in re.finditer(r"# FAST:.*(?:\n[ \t]*#(?! FAST:).*)*", module.text):
        twins = re.findall(r"tests/reference/[\w/]+\.py", block[0])
        line = module.text.count("\n", 0, block.start()) + 1
        if not twins:
            yield f"line {line}: FAST names no tests/reference/ file"
        for twin in twins:
            if not (ROOT / twin).is_file():
                yield f"line {line}: FAST names {twin}, which is not there"
        if module.room != "datapath":
            yield f"line {line}: FAST outside the hot room"


MODULE_RULES: list[Callable[[Module], Iterator[str]]] = [
    has_docstring,
    imports_through_doors,
    is_silent,
    imports_at_the_top,
    has_good_size,
    finally_is_synchronous,
    atomic_is_atomic,
    catches_named_errors,
    fast_has_a_twin,
]


# ---------------------------------------------------------------------- rules over all the modules


def no_cycles(modules: list[Module]) -> Iterator[str]:
    """Neither rooms nor modules import in a circle, at run time."""
    names = {module.name for module in modules}
    by_module: dict[str, set[str]] = {name: set() for name in names}
    by_room: dict[str, set[str]] = {module.room: set() for module in modules}
    for module in modules:
        for node, name in module.imports:
            if node in module.type_only:
                continue
            target = name if name in names else name.rpartition(".")[0]
            if target in names - {module.name}:
                by_module[module.name].add(target)
                by_room[module.room] |= {Module(target, "").room} - {module.room}
    for graph in (by_room, by_module):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            yield "import cycle: " + " <- ".join(error.args[1])


def requests_never_change_the_graph(modules: list[Module]) -> Iterator[str]:
    functions = [(module, function) for module in modules for function in module.functions]
    changes = {function.name for _, function in functions if is_marked(function, "graph_code")}
    for module, function in functions:
        if is_marked(function, "io_code"):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and called_name(node) in changes:
                    yield f"{module.name} line {node.lineno}: @io_code calls {called_name(node)}"


PACKAGE_RULES = [no_cycles, requests_never_change_the_graph]


# ----------------------------------------------------------------------------- the house as it is


def read_package() -> list[Module]:
    modules: list[Module] = []
    for path in sorted((ROOT / "nbdfleece").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules.append(Module(".".join(parts), path.read_text()))
    return modules


def project_files() -> list[Path]:
    """Return the files that belong to the project: git's view, or the folder's without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        paths = [Path(name) for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        made = re.compile(r"build|dist|__pycache__|\.git|\.venv|\.\w+_cache|\w+\.egg-info")
        paths = [path for path in paths if not any(map(made.fullmatch, path.parts))]
    return [path for path in paths if (ROOT / path).is_file()]


@pytest.mark.parametrize("rule", MODULE_RULES, ids=lambda rule: rule.__name__)
def test_every_module(rule: Callable[[Module], Iterator[str]]) -> None:
    faults = [f"{module.name}: {fault}" for module in read_package() for fault in rule(module)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package(rule: Callable[[list[Module]], Iterator[str]]) -> None:
    faults = list(rule(read_package()))
    assert not faults, "\n" + "\n".join(faults)


def test_every_room_is_known() -> None:
    unknown = {module.room for module in read_package()} - set(DOORS)
    assert not unknown, f"rooms without doors: {unknown}; see ARCHITECTURE.md"


def test_top_level_holds_only_what_belongs_there() -> None:
    tops = {path.parts[0] for path in project_files()}
    strange = {top for top in tops if top not in TOP_LEVEL and not top.startswith(".")}
    assert not strange, f"not expected at the top of the repository: {sorted(strange)}"


def test_no_text_file_names_a_path_of_somebodys_machine() -> None:
    faults: list[str] = []
    for path in project_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE_PATH.search(line):
                faults.append(f"{path}:{number}: {line.strip()[:80]}")
    assert not faults, "\n" + "\n".join(faults)


# ---------------------------------------------------------------- each rule catches a planted fault


def lines_of_code(count: int) -> str:
    return "".join(f"    x = {number}\n" for number in range(count))


PLANTED: list[tuple[Callable[[Module], Iterator[str]], str, str]] = [
    (has_docstring, "base.a", "x = 1\n"),
    (imports_through_doors, "base.a", "from nbdfleece.block import node\n"),
    (imports_through_doors, "jobs.a", "from nbdfleece import server\n"),
    (imports_through_doors, "cli.a", "import nbdfleece.block.node\n"),
    (imports_through_doors, "block.a", "from nbdfleece.base._inner import x\n"),
    (imports_through_doors, "block.a", "from nbdfleece.protocol.nbd import client\n"),
    (imports_through_doors, "control.a", "from nbdfleece.block.drivers.file import File\n"),
    (imports_through_doors, "control.a", "from ..datapath import pump\n"),
    (is_silent, "protocol.a", "import os.path\n"),
    (is_silent, "formats.a", "from asyncio import sleep\n"),
    (is_silent, "base.a", "async def f(): pass\n"),
    (imports_at_the_top, "block.a", "def f():\n    import json\n"),
    (has_good_size, "base.a", "if x:\n" + lines_of_code(700)),
    (has_good_size, "base.a", "def f():\n" + lines_of_code(70)),
    (has_good_size, "datapath.a", "def f():\n" + lines_of_code(150)),
    (has_good_size, "base.a", "class C:\n  def __init__(self):\n" + lines_of_code(25)),
    (finally_is_synchronous, "block.a", "async def f():\n try: x\n finally: await y\n"),
    (finally_is_synchronous, "block.a", "async def f():\n try: x\n finally:\n  async with y: z\n"),
    (atomic_is_atomic, "block.a", "async def f():\n with atomic(): x = await y\n"),
    (catches_named_errors, "block.a", "try: x\nexcept Exception: pass\n"),
    (catches_named_errors, "block.a", "try: x\nexcept: pass\n"),
    (
        catches_named_errors,
        "datapath.pump",
        "def f():\n try: x\n except Exception: y\n\ndef g():\n try: x\n except Exception: y\n",
    ),
    (catches_named_errors, "block.a", "try: x\nexcept (OSError, BaseException): pass\n"),
    (fast_has_a_twin, "datapath.a", "# FAST: saves 3 us\n# in all\nx = 1\n"),
    (fast_has_a_twin, "datapath.a", "# FAST: see tests/reference/not_there.py\n"),
    (fast_has_a_twin, "server.a", "# FAST: see tests/reference/not_there.py\n"),
]

INNOCENT: list[tuple[Callable[[Module], Iterator[str]], str, str]] = [
    (imports_through_doors, "block.drivers.nbd", "from nbdfleece.protocol.nbd import client\n"),
    (imports_through_doors, "cli.a", "from nbdfleece import __version__\n"),
    (imports_through_doors, "base.a", "from nbdfleece.base._inner import x\n"),
    (is_silent, "server.a", "import os\nasync def f(): pass\n"),
    (imports_at_the_top, "server.a", "def f():\n    from cryptography import x509\n"),
    (has_good_size, "base.a", "def f():\n    '''Doc.\n" + "    text\n" * 90 + "    '''\n"),
    (has_good_size, "datapath.a", "def f():\n" + lines_of_code(140)),
    (finally_is_synchronous, "block.a", "async def f():\n try: await x\n finally: y()\n"),
    (catches_named_errors, "block.a", "try: x\nexcept BaseException:\n  y\n  raise\n"),
    (catches_named_errors, "jobs.job", "def f():\n try: x\n except Exception: y\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_rule_catches_a_planted_fault(
    rule: Callable[[Module], Iterator[str]], name: str, text: str
) -> None:
    assert list(rule(Module(f"nbdfleece.{name}", text)))


@pytest.mark.parametrize(("rule", "name", "text"), INNOCENT)
def test_rule_leaves_good_code_alone(
    rule: Callable[[Module], Iterator[str]], name: str, text: str
) -> None:
    assert list(rule(Module(f"nbdfleece.{name}", text))) == []


def test_cycles_are_found_but_not_among_type_imports() -> None:
    one = Module("nbdfleece.block.one", "from nbdfleece.block.two import x\n")
    two = Module("nbdfleece.block.two", "import nbdfleece.block.one\n")
    typed = Module("nbdfleece.block.two", "if TYPE_CHECKING:\n import nbdfleece.block.one\n")

    assert list(no_cycles([one, two]))
    assert not list(no_cycles([one, typed]))


def test_request_code_that_changes_the_graph_is_found() -> None:
    graph = Module("nbdfleece.block.graph", "@graph_code\nasync def insert_filter(): pass\n")
    request = Module("nbdfleece.block.io", "@io_code\nasync def read():\n  await insert_filter()\n")

    assert list(requests_never_change_the_graph([graph, request]))


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("see /" + "home/me/x", True),
        ("cd /" + "work", True),
        ("a/home/b", False),
        ("/rooted", False),
    ],
    ids=["in a text", "in a command", "within a path", "a longer word"],
)
def test_machine_paths(line: str, is_fault: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is is_fault
