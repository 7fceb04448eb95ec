"""What every test shares: the library on the path, ComfyUI's own modules on request, and the same numbers every time.

The pack's root has an `__init__.py` (ComfyUI imports the folder as a package) and a folder `nodes/`. Neither may leak
into a test process: the first only imports inside ComfyUI, the second would shadow ComfyUI's module `nodes`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent


def _import_library() -> None:
    """Import `packforcing` without leaving the repository's root on the path.

    `python -m pytest` puts it there, and first; once imported, the package finds its own submodules.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != REPO]
    sys.path.append(str(REPO))
    try:
        importlib.import_module("packforcing")
    finally:
        sys.path.remove(str(REPO))


_import_library()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: of several at a time, it must not be the last one left."""
    items.sort(key=lambda item: item.path.name != "test_trainers.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: a collection of garbage, which tests of memory ask for often, need not go through it."""
    gc.freeze()


import comfyui as runtime  # noqa: E402  scripts/comfyui.py, by pytest's `pythonpath`
import launcher  # noqa: E402


class _RootIsNoPackage:
    """Collects the repository's root as a plain folder: pytest would import its `__init__.py` otherwise."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == REPO else None


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors gain nothing from a second thread, which takes a core while it waits. It also changes last bits.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    # A plug-in and not a hook of this file: pytest asks a conftest only about folders below it.
    config.pluginmanager.register(_RootIsNoPackage(), "root-is-no-package")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Fixed seeds, and the one thread, whatever the test before has asked for."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The folder of the ComfyUI to test against."""
    try:
        return runtime.find_runtime()
    except runtime.ComfyUIError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def comfy(comfy_path: Path) -> ModuleType:
    """ComfyUI's package `comfy` in this process, on the CPU where there is no CUDA; `nodes` etc. import as well."""
    launcher.declare_torchvision_operators()
    sys.path.insert(0, str(comfy_path))
    # As main.py does: ComfyUI's `nodes` puts the folder comfy/ on the path, whose utils.py would hide this package.
    importlib.import_module("utils.extra_config")
    package = importlib.import_module("comfy")
    # Before anything imports comfy.model_management, which reads it once.
    importlib.import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
    importlib.import_module("comfy.model_management")
    return package


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """This pack as ComfyUI imports it: a package from a folder of any name, which is not on the path."""
    name = "custom_nodes_x_my pack-1_x_2"
    spec = importlib.util.spec_from_file_location(name, REPO / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that torch.compile makes a graph of from here on, each as often as it does; they run uncompiled."""
    graphs: list[str] = []
    compile_ = torch.compile

    def counting(part: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            graphs.append(part.__name__)
            return graph.forward

        return compile_(part, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    return graphs
