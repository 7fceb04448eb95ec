"""Makes the workflows' pictures: photographs each in ComfyUI's real frontend, those of the demo models after a run.

    python scripts/pictures.py [NAME ...]    workflows/NAME.jpg (default: all); quickstart: docs/graph.png

Needs what the tests need (scripts/setup.sh --browser). What the nodes wrote and the whole graphs lie in out/pictures/.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from comfyui import REPO, Client, Server

sys.path.append(str(REPO / "tests" / "comfyui"))

from frontend import CHROMIUM_FLAGS, close_dialogs, find_chromium, load_workflow, open_frontend, queue_from_page
from PIL import Image
from playwright.sync_api import Page, sync_playwright

WORKFLOWS = sorted(path.stem for path in (REPO / "workflows").glob("*.json"))
OUT = REPO / "out" / "pictures"
LEFT, TOP, RIGHT, BOTTOM = 100, 120, 500, 300  # pixels of the page for its bars, messages and map
MARGIN = 20  # around the graph
TITLE = 34  # above a node's position
LONGEST_RUN = 3600  # seconds
THUMBNAIL = 640  # pixels wide

# Puts the graph's corner beside the page's bars, unscaled; returns its width and height.
_PLACE = """
([left, top, title]) => {
    const nodes = window.app.graph.nodes, canvas = window.app.canvas
    const x0 = Math.min(...nodes.map(n => n.pos[0])), y0 = Math.min(...nodes.map(n => n.pos[1])) - title
    const x1 = Math.max(...nodes.map(n => n.pos[0] + n.size[0])), y1 = Math.max(...nodes.map(n => n.pos[1] + n.size[1]))
    const box = document.querySelector('#graph-canvas').getBoundingClientRect()
    canvas.ds.scale = 1
    canvas.ds.offset = [left - box.x - x0, top - box.y - y0]
    canvas.setDirty(true, true)
    return [x1 - x0, y1 - y0]
}
"""
_RUNS_HERE = "() => window.app.graph.nodes.some(node => node.type === 'PackForcingDemoModels')"
_SHOWN = "() => [...document.querySelectorAll('video')].every(video => video.readyState >= 2)"


def photograph(page: Page, path: Path) -> None:
    """The whole graph at its own size, whatever the window's."""
    width, height = page.evaluate(_PLACE, [LEFT, TOP, TITLE])
    page.set_viewport_size({"width": round(width) + LEFT + RIGHT, "height": round(height) + TOP + BOTTOM})
    page.wait_for_timeout(500)
    page.evaluate(_PLACE, [LEFT, TOP, TITLE])
    page.wait_for_timeout(1500)
    clip = {"x": LEFT - MARGIN, "y": TOP - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    page.screenshot(path=str(path), clip=clip)


def picture_of(name: str, page: Page, client: Client) -> None:
    """Writes a workflow's pictures; it is run before, unless it needs files that are downloaded."""
    client.free()  # a node that is answered from ComfyUI's cache shows no preview
    load_workflow(page, REPO / "workflows" / f"{name}.json")
    close_dialogs(page)
    if page.evaluate(_RUNS_HERE):
        run_workflow(name, page, client)
    whole = OUT / f"{name}.png"
    photograph(page, whole)
    picture = Image.open(whole).convert("RGB")
    if name == "quickstart":
        picture.save(REPO / "docs" / "graph.png", optimize=True)
    picture.thumbnail((THUMBNAIL, 10 * THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(REPO / "workflows" / f"{name}.jpg", quality=85)


def run_workflow(name: str, page: Page, client: Client) -> None:
    """Runs the workflow on the page, and keeps what its nodes wrote."""
    run = queue_from_page(page, LONGEST_RUN)
    if run["status"] != "success":
        raise SystemExit(f"pictures: {name} ended as {run['status']}: {run.get('exception_message', '')}")
    for node, output in client.history(run["prompt_id"])["outputs"].items():
        for file in output.get("images", []):
            (OUT / f"{name}-{node}-{file['filename']}").write_bytes(client.download(file))
        for text in output.get("text", []):
            (OUT / f"{name}-{node}.txt").write_text(text)
    page.wait_for_function(_SHOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the workflows' pictures.")
    parser.add_argument("names", nargs="*", default=WORKFLOWS, metavar="NAME")
    names = parser.parse_args().names
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("pictures: Chromium was not found; install it, or set CHROMIUM.")
    with Server() as server, server.client() as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        open_frontend(page, server.url)
        for name in names:
            picture_of(name, page, client)
            print(f"{name}: workflows/{name}.jpg, out/pictures/{name}.png", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
