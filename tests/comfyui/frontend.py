"""ComfyUI's frontend in a real browser, as a user drives it. Import from any test: `from frontend import ...`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from playwright.sync_api import Page, TimeoutError

# Nothing but the page under test: no GPU to look for, no updates, no phoning home.
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
OPEN_MS = 120_000  # the first load on a busy small machine

# A new tab starts without what earlier tabs left behind (a reload keeps its own), and without the advertisement.
_FRESH_TAB = """
if (!sessionStorage.getItem('opened')) {
    localStorage.clear()
    localStorage.setItem('vueNodesBannerDismissed', 'true')
    sessionStorage.setItem('opened', 'yes')
}
"""

# The frontend's last step is to load its default workflow.
_IS_READY = "() => window.app?.extensionManager?.workflow?.activeWorkflow && window.app.graph.nodes.length > 0"

# In frontends of 2025, and of 2026.
_RUN_BUTTON = "[data-testid=queue-button] button, button[data-testid=queue-button]"

# Dropped on the canvas as a file, like a user's; resolves when the frontend has finished loading it.
_DROP = """
([name, text]) => new Promise((resolve, reject) => {
    const app = window.app, load = app.loadGraphData
    app.loadGraphData = async function (...args) {
        app.loadGraphData = load
        try { resolve(void await load.apply(app, args)) } catch (error) { reject(error); throw error }
    }
    const transfer = new DataTransfer()
    transfer.items.add(new File([text], name, { type: 'application/json' }))
    const event = { dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 640, clientY: 480 }
    document.querySelector('#graph-canvas').dispatchEvent(new DragEvent('drop', event))
})
"""

_MISSING = """
() => window.app.graph.nodes
    .filter(node => !(node.type in window.LiteGraph.registered_node_types))
    .map(node => node.type)
"""

# The plan that the workflow's Cache Config shows, wherever the node is, once it holds all of some words.
_PLAN = """
words => {
    const root = window.app.graph.rootGraph ?? window.app.graph
    const nodes = [root, ...(root.subgraphs?.values() ?? [])].flatMap(graph => [...graph.nodes])
    const node = nodes.filter(node => node.type === 'PackForcingCacheConfig').at(-1)
    const text = node?.widgets.find(widget => widget.name === 'plan')?.element.textContent ?? ''
    return words.every(word => text.includes(word)) && text
}
"""

# What lies at the middle of each node's title and at each output, as a user would point at it: {"what": "where"}.
_COVERED = """
() => {
    const { ds } = window.app.canvas, box = document.querySelector('#graph-canvas').getBoundingClientRect()
    const covered = []
    for (const node of window.app.graph.nodes) {
        const [x, y] = node.pos
        const spots = { title: [x + 60, y - 15] }
        for (const [slot, output] of (node.outputs ?? []).entries())
            spots[output.name] = [x + node.size[0] - 20, y + 14 + 20 * slot]
        for (const [spot, [left, top]] of Object.entries(spots)) {
            const at = [box.x + (left + ds.offset[0]) * ds.scale, box.y + (top + ds.offset[1]) * ds.scale]
            const element = document.elementFromPoint(...at)
            if (!element?.closest('#graph-canvas, [data-node-id], .dom-widget, [data-testid=transform-pane]'))
                covered.push(`${node.title} ${spot} ${at.map(Math.round)}: ${element?.outerHTML.slice(0, 200)}`)
        }
    }
    return covered
}
"""

_LISTEN = """
() => {
    window.endedPrompts = {}
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        window.app.api.addEventListener(kind, event => {
            window.endedPrompts[event.detail.prompt_id] = { status: kind.replace('execution_', ''), ...event.detail }
        }, { once: true })
}
"""


def find_chromium() -> str | None:
    """The system's Chromium: `CHROMIUM` from the environment, else by its usual names."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "/usr/bin/chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def open_frontend(page: Page, url: str, nodes_2: bool = False) -> None:
    """Open ComfyUI and wait until it is ready; leave an empty canvas. `nodes_2` asks for the rendering of that name.

    The Templates dialog of a very first start never shows: it would come a moment after everything else.
    """
    page.request.post(f"{url}/settings", data={"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes_2})
    page.add_init_script(_FRESH_TAB)
    page.goto(url, timeout=OPEN_MS)
    page.wait_for_function(_IS_READY, timeout=OPEN_MS)
    empty_canvas(page)


def reload_frontend(page: Page) -> None:
    """Press F5 and wait until ComfyUI is ready again, with the workflow that was open."""
    page.reload(timeout=OPEN_MS)
    page.wait_for_function(_IS_READY, timeout=OPEN_MS)


def empty_canvas(page: Page) -> None:
    """Close dialogs and take all nodes away."""
    close_dialogs(page)
    page.evaluate("() => window.app.graph.clear()")


def close_dialogs(page: Page) -> None:
    """Close every open dialog as a user does, with Escape."""
    for _ in range(5):
        if page.locator("[role=dialog]:visible").count() == 0:
            return
        page.keyboard.press("Escape")
        page.wait_for_timeout(300)


def load_workflow(page: Page, workflow: dict | str | Path, name: str = "workflow.json") -> None:
    """Drop a workflow (its JSON, or the path of its file) onto the canvas and wait until it is loaded."""
    if isinstance(workflow, dict):
        text = json.dumps(workflow)
    else:
        text, name = Path(workflow).read_text(encoding="utf-8"), Path(workflow).name
    page.evaluate(_DROP, [name, text])
    page.wait_for_timeout(200)  # one more frame of the canvas


def missing_nodes(page: Page) -> list[str]:
    """The node types of the loaded workflow that the frontend does not know."""
    return page.evaluate(_MISSING)


def plan_shown(page: Page, *words: str) -> str:
    """The plan on the Cache Config, in a subgraph too, once it holds all `words`; fails when it never does."""
    try:
        return page.wait_for_function(_PLAN, arg=list(words), timeout=20_000).json_value()
    except TimeoutError:
        raise AssertionError(f"The plan never held all of {words}; it is:\n{page.evaluate(_PLAN, [])}") from None


def covered(page: Page) -> list[str]:
    """Titles and outputs of nodes that something of the page covers, or that lie outside of it."""
    return page.evaluate(_COVERED)


def graph_to_prompt(page: Page) -> dict:
    """The loaded workflow as the frontend would send it: {"workflow": ..., "output": the API prompt}."""
    return page.evaluate("() => window.app.graphToPrompt()")


def press_run(page: Page) -> str:
    """Press Run and return the prompt's id, without waiting for the run."""
    with page.expect_response(lambda r: r.url.endswith("/prompt") and r.request.method == "POST") as sent:
        page.locator(_RUN_BUTTON).first.click()
    answer = sent.value
    if not answer.ok:
        raise AssertionError(f"ComfyUI refused the prompt: {answer.text()}")
    return answer.json()["prompt_id"]


def queue_from_page(page: Page, timeout: float = 300) -> dict:
    """Press Run and wait until the run ends: {"status": "success" | "error" | "interrupted", "prompt_id", ...}."""
    page.evaluate(_LISTEN)
    prompt_id = press_run(page)
    page.wait_for_function("id => window.endedPrompts[id]", arg=prompt_id, timeout=timeout * 1000)
    return page.evaluate("id => window.endedPrompts[id]", prompt_id)


def screenshot(page: Page, path: Path | str) -> Path:
    """Save what the page shows now as a PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(path))
    return path
