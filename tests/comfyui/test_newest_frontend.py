"""The pack in a frontend of today, in both of its renderings; the other tests open the one that ComfyUI 0.3.75 pins."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from comfyui import REPO, Server, frontend_folder
from frontend import close_dialogs, covered, load_workflow, missing_nodes, open_frontend, plan_shown, queue_from_page
from plan_links import TINY, check_plan_over_links
from playwright.sync_api import Browser, Page

_SMALL = """
() => {
    const changes = {
        PackForcingSampler: { width: 96, height: 64, seconds: 2 },
        PackForcingPromptSchedule: { text: '0:00 a red circle' },
    }
    for (const node of window.app.graph.nodes)
        for (const [name, value] of Object.entries(changes[node.type] ?? {}))
            node.widgets.find(widget => widget.name === name).value = value
}
"""

# Nodes that cover others, by what the page draws (Nodes 2.0), or else by their sizes.
_OVERLAPS = """
() => {
    const { ds } = window.app.canvas
    const boxes = window.app.graph.nodes.map(node => {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
        const height = drawn ? drawn.height / ds.scale : node.size[1] + 30
        return { name: node.title, x: node.pos[0], y: node.pos[1] - 30, width: node.size[0], height }
    })
    return boxes.flatMap((a, i) => boxes.slice(i + 1)
        .filter(b => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height)
        .map(b => [a.name, b.name]))
}
"""

_SHOWS = """
() => {
    const find = type => window.app.graph.nodes.find(node => node.type === type)
    const report = find('PackForcingCacheInspector').widgets.find(widget => widget.name === 'report').element
    const video = document.querySelector('video')
    return report.textContent.includes('2 blocks, 29 frames') && video?.readyState >= 1 && video.videoWidth
}
"""


_SMALL_VIDEO = "() => [...document.querySelectorAll('video')].some(video => video.videoWidth === 64)"
_USE_BLUEPRINT = """
() => {
    const graph = window.app.graph, node = graph.nodes[0]
    const add = type => { const made = window.LiteGraph.createNode(type); graph.add(made); return made }
    const slot = name => node.inputs.findIndex(input => input.name === name)
    const demo = add('PackForcingDemoModels'), save = add('SaveVideo')
    for (const [output, name] of ['model', 'clip', 'vae'].entries()) demo.connect(output, node, slot(name))
    node.connect(0, save, 0)
    const values = { text: '0:00 a blue square', seed: 3, width: 64, height: 64, seconds: 1, steps: 1 }
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
}
"""


@pytest.fixture(scope="module")
def newest(comfy_path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = frontend_folder()
    if not folder.is_dir():
        pytest.fail("There is no newer frontend: run scripts/setup.sh.", pytrace=False)
    base = tmp_path_factory.mktemp("newest-frontend")
    with Server(base, options=("--front-end-root", str(folder))).start() as server:
        yield server


@pytest.fixture(scope="module", params=["classic", "nodes-2.0"])
def newest_page(request: pytest.FixtureRequest, browser: Browser, newest: Server) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if "blueprint" in message.text else None)
    open_frontend(tab, newest.url, nodes_2=request.param == "nodes-2.0")
    yield tab
    context.close()
    assert complaints == []


def test_the_quick_start_loads_runs_and_shows_its_plan(newest_page: Page):
    page = newest_page
    load_workflow(page, REPO / "workflows" / "quickstart.json")
    close_dialogs(page)
    assert missing_nodes(page) == []
    assert "assumed" not in plan_shown(page, TINY, "128x128")
    assert covered(page) == []
    page.evaluate(_SMALL)
    assert queue_from_page(page)["status"] == "success"
    assert page.wait_for_function(_SHOWS, timeout=20_000).json_value() == 96
    assert page.evaluate(_OVERLAPS) == []


def test_no_workflows_nodes_cover_each_other(newest_page: Page):
    for file in sorted((REPO / "workflows").glob("*.json")):
        load_workflow(newest_page, file)
        close_dialogs(newest_page)
        newest_page.wait_for_timeout(500)  # nodes grow to what they show
        assert newest_page.evaluate(_OVERLAPS) == [], file.name


def test_the_blueprint_is_offered_and_runs_with_the_demo_models(newest_page: Page):
    page = newest_page
    [name] = [file.stem for file in (REPO / "subgraphs").glob("*.json")]
    offered = page.evaluate("async () => (await window.app.api.fetchApi('/global_subgraphs')).json()")
    assert name in [blueprint["name"] for blueprint in offered.values()]
    load_workflow(page, json.loads((REPO / "subgraphs" / f"{name}.json").read_text()))
    page.evaluate(_USE_BLUEPRINT)
    run = queue_from_page(page)
    assert run["status"] == "success", run
    page.wait_for_function(_SMALL_VIDEO, timeout=20_000)


@pytest.mark.parametrize("newest_page", ["nodes-2.0"], indirect=True)  # what a graph's links are, no rendering changes
def test_the_plan_follows_links(newest_page: Page):
    load_workflow(newest_page, REPO / "workflows" / "quickstart.json")
    check_plan_over_links(newest_page)
