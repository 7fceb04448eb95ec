"""A real ComfyUI server with this pack in it, its frontend in a real browser, and modules of the pack."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
from comfyui import Client, Server
from frontend import CHROMIUM_FLAGS, empty_canvas, find_chromium, open_frontend
from playwright.sync_api import Browser, Page, sync_playwright

# Any name goes: nothing in the pack may depend on it, so the tests use one that is not an identifier. Without blanks
# though: ComfyUI (its aiohttp) serves no web files and no templates of a pack whose folder's name has one.
PACK_FOLDER = "my-pack-1.2+copy"


@pytest.fixture(scope="session")
def server(comfy_path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: `.base_dir`, `.port`, `.url`, `.log`, `.client()`."""
    with Server(tmp_path_factory.mktemp("comfyui"), pack_folder=PACK_FOLDER).start() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A connection of its own for each test."""
    with server.client() as connection:
        yield connection


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium. Its absence is a failure: the frontend is half of what a user meets."""
    chromium = find_chromium()
    if chromium is None:
        pytest.fail("Chromium was not found; install the Debian package chromium, or set CHROMIUM.", pytrace=False)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def tab(browser: Browser, server: Server) -> Iterator[Page]:
    """The frontend in one tab for a file's tests: opening it takes longer than most of them.

    Not for all files: an open page draws all the time, which takes a fifth of a core from the tests that follow.
    """
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    opened = context.new_page()
    open_frontend(opened, server.url)
    yield opened
    context.close()


@pytest.fixture(scope="session")
def adapter(pack: ModuleType) -> ModuleType:
    """The pack's module over ComfyUI's own, in this process."""
    return importlib.import_module(f"{pack.__name__}.nodes.adapter")


@pytest.fixture(scope="session")
def progress(pack: ModuleType) -> ModuleType:
    """The pack's module of what is told while the sampler runs, in this process."""
    return importlib.import_module(f"{pack.__name__}.nodes.progress")


@pytest.fixture
def page(tab: Page) -> Page:
    """The frontend with an empty canvas, dialogs closed. Helpers are in frontend.py."""
    empty_canvas(tab)
    return tab
