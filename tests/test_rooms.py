"""The library's rooms: imports point one way, ComfyUI stays outside, modules and functions stay short.

`packforcing/` and `nodes/` are read as text, and the rules are checked on the syntax tree, imports inside functions
included. Each rule is also tried on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

GROUND = "ground"  # the modules directly in packforcing/
ENTRY = ("__init__", "__main__")  # of packforcing/ itself: they belong to no room
ROOMS = (
    GROUND,
    "files",
    "text",
    "cache",
    "model",
    "generate",
    "demo",
    "world",
    "inspector",
    "training",
    "evaluation",
    "bench",
    "cli",
)  # lowest first: a room imports from itself and from rooms before it
ALONE = {"world"}  # imports from the ground only
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}

MODULE_LINES = 400
FUNCTION_LINES = 60


@dataclass(frozen=True)
class Import:
    """One imported module."""

    target: tuple[str, ...]  # absolute: ("packforcing", "cache", "rope"); () from above packforcing/
    line: int


# --- reading ----------------------------------------------------------------------------------------------------------


def modules_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"), filename=str(module))


def dotted(module: Path, root: Path) -> tuple[str, ...]:
    """A file's place below `root`: ("packforcing", "cache", "rope"); a package's is that of its __init__."""
    return module.relative_to(root).with_suffix("").parts


def is_module(target: tuple[str, ...], root: Path) -> bool:
    path = root.joinpath(*target)
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(module: Path, root: Path) -> Iterator[Import]:
    """All imports of a file, wherever they stand; `from package import module` counts as an import of the module."""
    package = dotted(module, root)[:-1]
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(tuple(alias.name.split(".")), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package):
                yield Import((), node.lineno)
                continue
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                inner = (*target, alias.name)
                yield Import(inner if is_module(inner, root) else target, node.lineno)


def room_of(target: tuple[str, ...], root: Path) -> str | None:
    """The room of a module of the library; None for packforcing/__init__.py and __main__.py."""
    if len(target) < 2 or target[1] in ENTRY:
        return None
    return target[1] if root.joinpath(*target[:2]).is_dir() else GROUND


# --- the rules: each gives its violations as sentences ----------------------------------------------------------------


def unknown_rooms(root: Path) -> list[str]:
    """Folders with modules that have no place in ROOMS."""
    rooms = {room_of(dotted(module, root), root) for module in modules_of(root / "packforcing")}
    return [f"packforcing/{room} has no place in ROOMS" for room in sorted(rooms - {None} - set(ROOMS))]


def wrong_way_imports(root: Path) -> list[str]:
    """Imports from a room to one that is above it."""
    found = []
    for module in modules_of(root / "packforcing"):
        room = room_of(dotted(module, root), root)
        if room is None:
            continue
        for item in imports_of(module, root):
            if item.target[:1] != ("packforcing",):
                continue
            target = room_of(item.target, root)
            name = ".".join(item.target)
            if target is None:
                if item.target[1:2] == ("__main__",) or room == GROUND:
                    found.append(f"{module.relative_to(root)}:{item.line} imports {name}")
            elif ROOMS.index(target) > ROOMS.index(room) or (room in ALONE and target not in (room, GROUND)):
                found.append(f"{module.relative_to(root)}:{item.line} ({room}) imports {name} ({target})")
    return found


def import_cycles(root: Path) -> list[str]:
    """A circle of modules that import each other, anywhere in the library."""
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module in modules_of(root / "packforcing"):
        name = dotted(module, root)
        targets = {item.target for item in imports_of(module, root) if item.target[:1] == ("packforcing",)}
        # A package stands for its __init__.
        graph[name] = {(*t, "__init__") if root.joinpath(*t).is_dir() else t for t in targets} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(".".join(name) for name in error.args[1])]
    return []


def foreign_imports(root: Path) -> list[str]:
    """Imports of ComfyUI or of nodes/ in the library."""
    return [
        f"{module.relative_to(root)}:{item.line} imports {'.'.join(item.target) or 'from above packforcing/'}"
        for module in modules_of(root / "packforcing")
        for item in imports_of(module, root)
        if not item.target or item.target[0] in COMFYUI
    ]


def long_modules(root: Path) -> list[str]:
    found = []
    for module in modules_of(root / "packforcing"):
        lines = len(module.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            found.append(f"{module.relative_to(root)} has {lines} lines")
    return found


def long_functions(folder: Path, allowed: frozenset[str] = frozenset()) -> list[str]:
    """Functions and methods that are too long, but for those of the names in `allowed`."""
    found = []
    for module in modules_of(folder):
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in allowed:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = (node.end_lineno or first) - first + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{folder.name}/{module.relative_to(folder)}: {node.name} has {lines} lines")
    return found


# --- the pack ---------------------------------------------------------------------------------------------------------


def test_every_folder_has_its_place():
    assert unknown_rooms(REPO) == []


def test_imports_point_one_way():
    assert wrong_way_imports(REPO) == []


def test_no_module_imports_itself_by_a_detour():
    assert import_cycles(REPO) == []


def test_the_library_knows_nothing_of_comfyui():
    assert foreign_imports(REPO) == []


def test_modules_are_short():
    assert long_modules(REPO) == []


def test_functions_are_short():
    assert long_functions(REPO / "packforcing") == []


def test_functions_of_nodes_are_short():
    """A schema is a list of inputs with their tooltips, as long as the node has inputs."""
    assert long_functions(REPO / "nodes", allowed=frozenset({"define_schema"})) == []


# --- the rules themselves ---------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root


WELL_KEPT = {
    "packforcing/__init__.py": "from .errors import PackForcingError\n",
    "packforcing/__main__.py": "from .cli.main import main\n",
    "packforcing/errors.py": "class PackForcingError(ValueError): ...\n",
    "packforcing/config.py": "import torch\nfrom .errors import PackForcingError\n",
    "packforcing/cache/__init__.py": "",
    "packforcing/cache/rope.py": "from .. import __version__\nfrom ..config import Layout\n",
    "packforcing/cache/cache.py": "from . import rope\nfrom ..config import Layout\n",
    "packforcing/model/__init__.py": "",
    "packforcing/model/wan.py": "from ..cache.cache import Cache\nimport packforcing.config\n",
    "packforcing/cli/__init__.py": "",
    "packforcing/cli/main.py": "from .. import config\nfrom ..model import wan\n",
    "packforcing/world/__init__.py": "",
    "nodes/sampler.py": "import comfy\nfrom ..packforcing.model import wan\n",
}


def test_a_well_kept_tree_passes(tmp_path):
    root = write(tmp_path, WELL_KEPT)
    for rule in (unknown_rooms, wrong_way_imports, import_cycles, foreign_imports, long_modules):
        assert rule(root) == [], rule.__name__
    assert long_functions(root / "packforcing") == []


ERRORS, ROPE, WAN = "packforcing/errors.py", "packforcing/cache/rope.py", "packforcing/model/wan.py"


@pytest.mark.parametrize(
    ("rule", "path", "text", "said"),
    [
        (unknown_rooms, "packforcing/attic/box.py", "", "packforcing/attic has no place"),
        (wrong_way_imports, ROPE, "from ..model.wan import Wan\n", "imports packforcing.model.wan"),
        (wrong_way_imports, ROPE, "from ..model import wan\n", "imports packforcing.model.wan"),
        (wrong_way_imports, ROPE, "from .. import model\n", "imports packforcing.model"),
        (wrong_way_imports, ROPE, "import packforcing.model.wan\n", "imports packforcing.model.wan"),
        (wrong_way_imports, ROPE, "def f():\n    from ..model import wan\n", "rope.py:2 (cache)"),
        (wrong_way_imports, "packforcing/cache/__init__.py", "from ..model.wan import Wan\n", "cache/__init__.py:1"),
        (wrong_way_imports, ERRORS, "from .cache.rope import rotate\n", "errors.py:1 (ground)"),
        (wrong_way_imports, "packforcing/world/shapes.py", "from ..cache import rope\n", "(world) imports"),
        (wrong_way_imports, WAN, "from ..__main__ import main\n", "imports packforcing.__main__"),
        (import_cycles, ERRORS, "from . import config\n", "packforcing.config"),
        (import_cycles, ROPE, "def f():\n    from .cache import Cache\n", "packforcing.cache.rope"),
        (foreign_imports, WAN, "import comfy.ops\n", "wan.py:1 imports comfy.ops"),
        (foreign_imports, WAN, "def f():\n    from nodes.types import X\n", "wan.py:2 imports nodes"),
        (foreign_imports, WAN, "from ...nodes.types import X\n", "from above packforcing/"),
        (long_modules, WAN, "x = 1\n" * 401, "packforcing/model/wan.py has 401 lines"),
    ],
)
def test_a_rule_finds_what_breaks_it(tmp_path, rule, path, text, said):
    violations = rule(write(tmp_path, {**WELL_KEPT, path: text}))
    assert violations
    assert any(said in violation for violation in violations), violations


@pytest.mark.parametrize("head", ["def work():", "@cached\ndef work():", "class A:\n    async def work(self):"])
def test_a_long_function_is_found(tmp_path, head):
    indent = "        " if head.startswith("class") else "    "
    lines = FUNCTION_LINES - 1 - head.count("@")
    for more, found in ((0, 0), (1, 1)):
        root = write(tmp_path, {"nodes/a.py": f"{head}\n" + f"{indent}x = 1\n" * (lines + more)})
        assert len(long_functions(root / "nodes")) == found
    assert long_functions(tmp_path / "nodes", allowed=frozenset({"work"})) == []
