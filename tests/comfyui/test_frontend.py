"""The pack in ComfyUI's real frontend: the workflow files as a user drops them, and what the nodes show."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from comfyui import REPO, Client, workflow_to_prompt
from frontend import (
    close_dialogs,
    covered,
    graph_to_prompt,
    load_workflow,
    missing_nodes,
    plan_shown,
    queue_from_page,
    screenshot,
)
from plan_links import check_plan_over_links
from playwright.sync_api import Page

from packforcing.files.side_by_side import GAP

WORKFLOWS = sorted(path.stem for path in (REPO / "workflows").glob("*.json"))
TITLE_HEIGHT = 30  # litegraph's, above a node's position

_SAVED = "() => window.app.graph.serialize()"

_SET_WIDGET = """
([type, name, value]) => {
    for (const node of window.app.graph.nodes.filter(node => node.type === type)) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
    }
}
"""

# The text that a node shows on itself, once it holds all of some words.
_SHOWS = """
([type, widget, words]) => {
    const node = window.app.graph.nodes.find(node => node.type === type)
    const element = node.widgets.find(each => each.name === widget)?.element
    const text = element?.innerText ?? ''
    return element?.checkVisibility() && words.every(word => text.includes(word)) && text
}
"""

# What the nodes show after a run, once all of it is there.
_PICTURES = """
() => {
    const node = type => window.app.graph.nodes.find(node => node.type === type)
    const picture = node('PackForcingCacheInspector').imgs?.[0]
    const video = document.querySelector('video')
    if (!picture?.naturalWidth || !(video?.readyState >= 1)) return null
    return { picture: picture.naturalWidth, video: [video.videoWidth, video.videoHeight], seconds: video.duration }
}
"""


def workflow(name: str) -> dict:
    return json.loads((REPO / "workflows" / f"{name}.json").read_text())


def drop(page: Page, name: str) -> None:
    """Drop a workflow of the pack and close what the frontend has to say about missing model files."""
    load_workflow(page, REPO / "workflows" / f"{name}.json")
    close_dialogs(page)


def shown(page: Page, node: str, widget: str, *words: str) -> str:
    """The text on a node, once it holds all `words`; fails when it never does."""
    return page.wait_for_function(_SHOWS, arg=[node, widget, words], timeout=20_000).json_value()


def times_shown(page: Page, *words: str) -> str:
    return shown(page, "PackForcingPromptSchedule", "times", *words)


def set_widget(page: Page, node: str, **values: float | str) -> None:
    """Changes widgets of all nodes of a type."""
    for name, value in values.items():
        page.evaluate(_SET_WIDGET, [node, name, value])


def overlaps(nodes: list[dict]) -> list[tuple[str, str]]:
    """Pairs of nodes of which one covers a part of the other."""
    boxes = []
    for node in nodes:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((node["type"], x, y - TITLE_HEIGHT, x + width, y + height))
    return [
        (a, b)
        for (a, ax0, ay0, ax1, ay1), (b, bx0, by0, bx1, by1) in combinations(boxes, 2)
        if ax0 < bx1 and bx0 < ax1 and ay0 < by1 and by0 < ay1
    ]


def test_every_dropped_workflow_is_whole(page: Page, client: Client):
    for name in WORKFLOWS:
        file = workflow(name)
        drop(page, name)
        assert missing_nodes(page) == [], name
        loaded = page.evaluate(_SAVED)
        types = {node["id"]: node["type"] for node in file["nodes"]}
        assert {node["id"]: node["type"] for node in loaded["nodes"]} == types, name
        assert sorted(loaded["links"]) == sorted(file["links"]), name
        sockets = [slot for node in loaded["nodes"] for slot in node.get("inputs", []) if slot["link"] is not None]
        assert len(sockets) == len(file["links"]), name
        # Nothing slipped from one widget to the next, and what the nodes show on themselves is not saved.
        for node, saved in zip(by_id(loaded), by_id(file), strict=True):
            assert node.get("widgets_values", [])[: len(saved["widgets_values"])] == saved["widgets_values"], name
        assert graph_to_prompt(page)["output"] == workflow_to_prompt(file, client.object_info()), name
        assert overlaps(loaded["nodes"]) == [], name
        assert covered(page) == [], name


def test_the_last_releases_workflows_still_load(page: Page, client: Client):
    """Their nodes had fewer inputs; those that are newer take their defaults."""
    old = sorted((REPO / "tests" / "data" / "workflows-0.1").glob("*.json"))
    for file in (*old, REPO / "tests" / "references" / "quickstart-0.1.json"):
        load_workflow(page, file)
        close_dialogs(page)
        assert missing_nodes(page) == [], file.name
        saved = json.loads(file.read_text())
        for node, before in zip(by_id(page.evaluate(_SAVED)), by_id(saved), strict=True):
            values = before["widgets_values"]
            assert node.get("widgets_values", [])[: len(values)] == values, file.name
        assert graph_to_prompt(page)["output"] == workflow_to_prompt(saved, client.object_info()), file.name
    assert len(old) == 3


def by_id(graph: dict) -> list[dict]:
    return sorted(graph["nodes"], key=lambda node: node["id"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_file_that_a_workflow_needs_is_named_with_its_address(name: str):
    types = ("PackForcingModelLoader", "CLIPLoader", "VAELoader")
    loaders = [node for node in workflow(name)["nodes"] if node["type"] in types]
    for node in loaders:
        [model] = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{model['name']}")
        assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
    assert len(loaders) == (0 if name in ("quickstart", "memory") else 3)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_file_that_the_page_does_not_download_is_linked_in_the_note(name: str):
    nodes = workflow(name)["nodes"]
    [note] = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    for model in (model for node in nodes for model in node["properties"].get("models", [])):
        if not model["name"].endswith(".safetensors"):
            assert f"({model['url'].replace('/resolve/', '/blob/')})" in note


def test_the_memory_workflow_is_the_quick_start_with_and_without_mid_blocks():
    def widgets(name: str, kind: str) -> list[list]:
        return [node["widgets_values"] for node in workflow(name)["nodes"] if node["type"] == kind]

    for kind, copies in (("PackForcingPromptSchedule", 1), ("PackForcingSampler", 2)):
        assert widgets("memory", kind) == copies * widgets("quickstart", kind)
    [usual] = widgets("quickstart", "PackForcingCacheConfig")
    top_k = 3  # its place among the widgets
    assert usual[top_k] > 0
    assert widgets("memory", "PackForcingCacheConfig") == [usual, [*usual[:top_k], 0, *usual[top_k + 1 :]]]


def test_the_cache_config_shows_its_plan_live(page: Page):
    drop(page, "wan2.1-1.3b")
    plan_shown(page, "832x480", "160 blocks, 480 latent frames, wan2.1-1.3b", "4,680 tokens", "full cache")
    set_widget(page, "PackForcingSampler", seconds=60)
    plan_shown(page, "80 blocks")
    set_widget(page, "PackForcingSampler", seconds=120)
    set_widget(page, "PackForcingCacheConfig", block_frames=4)
    plan_shown(page, "sink_frames must be whole blocks of 4 latent frames, but it is 6: set it to 4 or 8.")
    set_widget(page, "PackForcingCacheConfig", sink_frames=8, recent_frames=4)
    plan_shown(page, "27,872 tokens, constant", "3.99 GB of KV", "138.02 GB, 748,800 tokens", "182 tokens a block")
    set_widget(page, "PackForcingCacheConfig", top_k=0)
    plan_shown(page, "24,960 tokens, constant", "mid 0")
    set_widget(page, "PackForcingSampler", width=416)
    plan_shown(page, "416x480", "12,480 tokens, constant")


def test_the_prompt_schedule_shows_live_when_its_prompts_start(page: Page):
    """So a prompt beyond the video's end is told before anything runs."""
    drop(page, "quickstart")
    set_widget(page, "PackForcingPromptSchedule", text="0:00 a\n0:05 b")
    times_shown(page, "0:00      block 0      begins at 0:00", "0:05      block 5      begins at 0:04.81", "40 blocks")
    set_widget(page, "PackForcingSampler", seconds=4)
    times_shown(page, "The prompt at 0:05, 'b', has no block of its own before the video's end at 0:03.812: move it")
    set_widget(page, "PackForcingSampler", seconds=8, fps=8)
    times_shown(page, "block 3      begins at 0:05.62", "4 blocks")
    set_widget(page, "PackForcingCacheConfig", block_frames=1)
    times_shown(page, "block 11     begins at 0:05.12", "16 blocks")
    set_widget(page, "PackForcingPromptSchedule", text="0:00 a\nlater b")
    times_shown(page, "Line 2 of the story, 'later b', must begin with a time")


def test_the_plan_follows_links_and_says_what_it_assumes(page: Page):
    drop(page, "quickstart")
    check_plan_over_links(page)


@pytest.mark.parametrize(("name", "joined"), [("quickstart", 1), ("memory", 2)])
def test_a_run_from_the_page_shows_report_picture_and_video(
    page: Page, client: Client, tmp_path: Path, name: str, joined: int
):
    drop(page, name)
    shown(page, "PackForcingCacheInspector", "report", "Run the workflow")
    set_widget(page, "PackForcingSampler", width=96, height=64, seconds=2)
    set_widget(page, "PackForcingPromptSchedule", text="0:00 a red circle\n0:01 a blue square")
    run = queue_from_page(page)
    assert run["status"] == "success"
    report = shown(page, "PackForcingCacheInspector", "report", "PackForcing cache: 2 blocks, 29 frames")
    outputs = client.history(run["prompt_id"])["outputs"]
    [told] = [output["text"] for output in outputs.values() if "text" in output]
    assert report.split() == told[0].split()
    pictures = page.wait_for_function(_PICTURES, timeout=20_000).json_value()
    assert pictures["picture"] == 800
    width, height = pictures["video"]
    assert width == joined * 96 + (joined - 1) * GAP
    assert (height == 64) == (joined == 1)  # else there is a band with labels
    assert pictures["seconds"] == pytest.approx(29 / 16, abs=0.01)
    # The previews have made their nodes grow, and still nothing is covered.
    assert overlaps(page.evaluate(_SAVED)["nodes"]) == []
    assert screenshot(page, tmp_path / f"{name}.png").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("node", "change", "told"),
    [
        (
            "PackForcingCacheConfig",
            {"sink_frames": 6},
            "sink_frames must be whole blocks of 4 latent frames, but it is 6: set it to 4 or 8.",
        ),
        (
            "PackForcingPromptSchedule",
            {"text": "0:00 a red circle\n0:xx a blue square"},
            "Line 2 of the story, '0:xx a blue square', must begin with a time such as 0:20",
        ),
    ],
)
def test_a_mistake_is_shown_once(page: Page, node: str, change: dict, told: str):
    drop(page, "quickstart")
    set_widget(page, node, **change)
    with pytest.raises(AssertionError, match="refused the prompt"):
        queue_from_page(page)
    dialog = page.locator("[role=dialog]:visible")
    dialog.wait_for(timeout=10_000)
    text = dialog.inner_text()
    assert text.count(told) == 1
