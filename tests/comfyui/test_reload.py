"""The page is reloaded while the sampler runs: the run goes on, and the page goes on to show it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from comfyui import REPO, Client, Result, Server, set_widget
from frontend import close_dialogs, graph_to_prompt, load_workflow, open_frontend, press_run, reload_frontend
from graphs import forget, saved_frames
from playwright.sync_api import ConsoleMessage, Error, Page

SIZES = {"width": 64, "height": 64}
LENGTHS = (40, 160)  # in blocks, a second each; on a busy machine a page is not back before the end of the shorter one
SHOWN_MS = 120_000
OWN = "getCanvas: canvas is null"  # the frontend's own, when an event of a run comes before its canvas is there

# What the sampler shows of its run, once its line of text holds some words and there is a preview.
_TOLD = """
words => {
    const node = window.app.graph.nodes.find(node => node.type === 'PackForcingSampler')
    const text = node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''
    return text.includes(words) && node.imgs?.[0]?.naturalWidth && { text, progress: node.progress }
}
"""
_VIDEO = """
() => {
    const video = document.querySelector('video')
    return video?.readyState >= 1 && [video.videoWidth, video.videoHeight, video.duration]
}
"""


@pytest.fixture
def errors(page: Page) -> Iterator[list[str]]:
    """The errors in the page's console, without what it could not fetch: files that are optional, the wide network."""
    found: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(("Failed to load resource", "Connecting to")):
            found.append(message.text)

    def hear_uncaught(error: Error) -> None:
        found.append(str(error))

    page.on("console", hear)
    page.on("pageerror", hear_uncaught)
    yield found
    page.remove_listener("console", hear)
    page.remove_listener("pageerror", hear_uncaught)


def small_quickstart(client: Client, blocks: int) -> dict:
    workflow = json.loads((REPO / "workflows" / "quickstart.json").read_text())
    for node in workflow["nodes"]:
        if node["type"] == "PackForcingSampler":
            for name, value in {**SIZES, "seconds": float(blocks)}.items():
                set_widget(node, client.object_info()[node["type"]], name, value)
        if node["type"] == "PackForcingPromptSchedule":
            set_widget(node, client.object_info()[node["type"]], "text", "0:00 a red circle\n0:03 a blue square")
    return workflow


def frames(server: Server, prompt: dict, result: Result) -> np.ndarray:
    """Of the video that Save Video wrote."""
    [node] = [name for name, node in prompt.items() if node["class_type"] == "SaveVideo"]
    return saved_frames(server, result.raise_for_status(), node)


def test_a_reloaded_page_goes_on_to_show_the_run(server: Server, client: Client, page: Page, errors: list[str]):
    open_frontend(page, server.url)
    own = {*errors, OWN}  # those that the frontend itself has whenever it is opened
    for blocks in LENGTHS:
        load_workflow(page, small_quickstart(client, blocks))
        close_dialogs(page)
        prompt = graph_to_prompt(page)["output"]
        forget(server, client)
        running = press_run(page)
        page.wait_for_function(_TOLD, arg=f" of {blocks}, ", timeout=SHOWN_MS)
        reload_frontend(page)
        if client.history(running) is None:
            break

    assert client.history(running) is None
    assert graph_to_prompt(page)["output"] == prompt
    again = page.wait_for_function(_TOLD, arg=f" of {blocks}, ", timeout=SHOWN_MS).json_value()
    assert 0 < again["progress"] < 1
    made = frames(server, prompt, client.wait(running))
    assert len(made) == 16 * blocks - 3
    width, height, seconds = page.wait_for_function(_VIDEO, timeout=SHOWN_MS).json_value()
    assert (width, height) == (SIZES["width"], SIZES["height"])
    assert seconds == pytest.approx(len(made) / 16, abs=0.01)
    assert set(errors) <= own
