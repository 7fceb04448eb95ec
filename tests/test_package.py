"""What reaches a user: the files that the Comfy Registry ships, what pyproject.toml says, and what pip installs.

comfy-cli ships what git tracks and `.comfyignore` does not name. Here `.gitignore` stands for git's index, so that the
test also runs where there is no git, and sees a new file before it is added.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pathspec import GitIgnoreSpec
from PIL import Image

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings its backport
    import tomli as tomllib

REPO = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 20_000_000  # all files; the demo weights are 13 MB of it
LARGEST_PICTURE = 200_000
DEVELOPMENT = {"tests", "benchmarks", "scripts", ".ci", ".github", ".venv"}


def shipped_files(root: Path) -> set[str]:
    """The files that comfy-cli would ship, by their paths below `root`."""
    ignored = [spec_of(root / name) for name in (".gitignore", ".comfyignore")]
    return {path for path in files_below(root, ignored[0]) if not any(spec.match_file(path) for spec in ignored)}


def spec_of(file: Path) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines())


def files_below(root: Path, ignored: GitIgnoreSpec) -> Iterator[str]:
    """All files but git's own, without going into folders that are ignored."""
    for folder, folders, files in os.walk(root):
        below = Path(folder).relative_to(root)
        paths = {name: f"{(below / name).as_posix()}/" for name in folders}
        folders[:] = [name for name, path in paths.items() if name != ".git" and not ignored.match_file(path)]
        yield from ((below / name).as_posix() for name in files if name != ".git")


def imported_files(root: Path, start: str) -> set[str]:
    """The files that importing `start` imports of the pack, imports inside functions included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += relative_imports(root, file)
    return found


def relative_imports(root: Path, file: str) -> list[str]:
    """The files that a module imports from its own package, and the packages above them."""
    files: list[str] = []
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = Path(file).parent.parts
        base = (*parts[: len(parts) - node.level + 1], *(node.module or "").split("."))
        base = tuple(part for part in base if part)
        for target in (base, *((*base, alias.name) for alias in node.names)):
            path = Path(*target)
            files += [f"{p.as_posix()}/__init__.py".removeprefix("./") for p in (path, *path.parents)]
            files.append(path.with_suffix(".py").as_posix())
    return [file for file in files if (root / file).is_file()]


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    return shipped_files(REPO)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


# --- the files --------------------------------------------------------------------------------------------------------


def test_everything_that_the_nodes_import_is_shipped(shipped: set[str]):
    needed = imported_files(REPO, "__init__.py")
    assert {"nodes/sampler.py", "packforcing/__init__.py", "packforcing/cache/cache.py"} <= needed
    assert needed <= shipped


def test_what_is_read_beside_the_modules_is_shipped(shipped: set[str]):
    wanted = {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "web/packforcing.js"}
    for folder, pattern in (
        *(("packforcing/weights", "*"), ("web/docs", "*.md"), ("workflows", "*"), ("locales", "*/*.json")),
        ("packforcing", "**/*.py"),  # the library whole: the command works from the pack's folder, too
    ):
        found = {path.relative_to(REPO).as_posix() for path in (REPO / folder).glob(pattern)}
        assert found
        wanted |= found
    assert {path for path in wanted if "__pycache__" not in path} <= shipped


def test_nothing_of_the_development_is_shipped(shipped: set[str]):
    assert not {path for path in shipped if path.split("/")[0] in DEVELOPMENT or Path(path).name.startswith(".")}
    assert not {path for path in shipped if re.match(r"(test_|conftest)", Path(path).name)}


def test_the_shipped_files_are_small(shipped: set[str]):
    sizes = {path: (REPO / path).stat().st_size for path in shipped}
    assert sum(sizes.values()) < LARGEST_BYTES
    pictures = {path: size for path, size in sizes.items() if path.endswith((".png", ".jpg", ".gif", ".svg"))}
    assert pictures
    assert max(pictures.values()) < LARGEST_PICTURE


def test_the_rules_find_what_they_are_for(tmp_path: Path):
    for name, text in {
        ".gitignore": ".venv\n*.pyc\n",
        ".comfyignore": "# not these\n/tests/\n/docs/*.png\n",
        "__init__.py": "from .nodes.one import One\n",
        "nodes/__init__.py": "",
        "nodes/one.py": "def run():\n    from ..library import two\n",
        "library/__init__.py": "",
        "library/two.py": "import os\n",
        "library/three.py": "",
        "library/tests/four.py": "",
        **dict.fromkeys(("tests/test_one.py", "docs/one.png", "docs/one.md", ".venv/x.py", "nodes/one.pyc"), ""),
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    needed = {"__init__.py", "nodes/__init__.py", "nodes/one.py", "library/__init__.py", "library/two.py"}
    assert imported_files(tmp_path, "__init__.py") == needed
    beside = {".gitignore", ".comfyignore", "library/three.py", "library/tests/four.py", "docs/one.md"}
    assert shipped_files(tmp_path) == needed | beside


# --- pyproject.toml ---------------------------------------------------------------------------------------------------


def test_the_registry_finds_what_it_asks_for(project: dict):
    """The rules of docs.comfy.org/registry/specifications."""
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?=[a-z0-9])){0,98}", about["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert (REPO / about["license"]["file"]).is_file()
    assert comfy["PublisherId"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert any(classifier.startswith("Operating System :: ") for classifier in about["classifiers"])
    urls = about["urls"]
    assert {"Repository", "Documentation", "Bug Tracker"} <= urls.keys()
    assert urls["Issues"] == urls["Bug Tracker"] == f"{urls['Repository']}/issues"
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_the_icon_is_a_file_of_the_repository(project: dict):
    repository = project["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    start = f"https://raw.githubusercontent.com/{repository}/main/"
    icon = project["tool"]["comfy"]["Icon"]
    assert icon.startswith(start)
    file = REPO / icon.removeprefix(start)
    if file.suffix == ".svg":
        width, height = (int(re.search(rf'{side}="(\d+)"', file.read_text())[1]) for side in ("width", "height"))
    else:
        with Image.open(file) as picture:
            width, height = picture.size
    assert width <= 800
    assert height <= 400


def test_workflows_name_the_pack_that_manager_is_to_install(project: dict):
    """Manager looks up a missing node by the registry's name in the workflow."""
    files = sorted((REPO / "workflows").glob("*.json"))
    assert files
    for file in files:
        nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
        named = {node["properties"].get("cnr_id") for node in nodes if node["type"].startswith("PackForcing")}
        assert named == {project["project"]["name"]}, file.name


# --- what pip installs ------------------------------------------------------------------------------------------------


def requirements(file: Path) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(each.name): each for each in found}


def test_installing_the_requirements_changes_nothing_that_comfyui_asks_for(comfy_path: Path):
    """Ours name nothing that ComfyUI's requirements name, so pip has no reason to touch those."""
    ours, theirs = requirements(REPO / "requirements.txt"), requirements(comfy_path / "requirements.txt")
    assert {"torch", "numpy", "pillow", "av"} <= theirs.keys()
    assert ours
    assert not ours.keys() & theirs.keys()


def test_pip_and_comfyui_agree_on_the_requirements(project: dict):
    """What `pip install .` asks for is what ComfyUI has, with requirements.txt besides."""
    asked = {canonicalize_name(Requirement(each).name): each for each in project["project"]["dependencies"]}
    for name, requirement in requirements(REPO / "requirements.txt").items():
        assert Requirement(asked[name]) == requirement
