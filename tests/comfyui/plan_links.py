"""The live plan behind all that may lie between the nodes: `from plan_links import check_plan_over_links`."""

from __future__ import annotations

from frontend import plan_shown
from playwright.sync_api import Page

# What every change can use. `insert(type, from, slot, to, input)` puts a node between two, by its first slots.
_HELPERS = """
const app = window.app, graph = app.graph
const add = (type, values = {}) => {
    const node = window.LiteGraph.createNode(type)
    graph.add(node)
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
    return node
}
const find = type => graph.nodes.find(node => node.type === type)
const slot = (node, name) => node.inputs.findIndex(input => input.name === name)
const link = (from, output, to, name) => from.connect(output, to, slot(to, name))
const cut = (to, name) => to.disconnectInput(slot(to, name))
const sampler = find('PackForcingSampler'), config = find('PackForcingCacheConfig')
const demo = find('PackForcingDemoModels')
"""

TINY = "40 blocks, 160 latent frames, tiny"

# In this order, on the quick start: what is done to the graph, what the plan then shows, and what it does not.
STEPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("", (TINY, "128x128", "3.28 MB of KV"), "assumed"),
    (
        "const r = add('Reroute'), m = add('Reroute'); config.connect(0, r, 0); r.connect(0, sampler, 2);"
        "demo.connect(0, m, 0); m.connect(0, sampler, 0)",
        (TINY, "128x128"),
        "assumed",
    ),
    ("link(add('PrimitiveFloat', { value: 20 }), 0, sampler, 'seconds')", ("20 blocks, 80 latent frames",), "assumed"),
    (
        "const p = add('PrimitiveNode'); p.connect(0, sampler, slot(sampler, 'seconds')); p.widgets[0].value = 8",
        ("8 blocks, 32 latent frames",),
        "assumed",
    ),
    (
        "link(add('GetVideoComponents'), 2, sampler, 'seconds')",
        ("assumed    120 s\n           as other nodes compute it\nvideo      128x128",),
        "832x480",
    ),
    (
        "link(add('EmptyHunyuanLatentVideo', { width: 256, height: 128, length: 33 }), 0, sampler, 'latent')",
        ("256x128", "3 blocks, 12 latent frames, tiny"),
        "assumed",
    ),
    ("cut(sampler, 'latent'); cut(sampler, 'seconds')", (TINY,), "assumed"),
    (
        "const l = add('LoraLoaderModelOnly'); link(add('UNETLoader', { unet_name: 'wan2.1_t2v_14B_fp8.safetensors' }),"
        " 0, l, 'model'); link(l, 0, sampler, 'model')",
        ("40 blocks, 160 latent frames, wan2.1-14b",),
        "assumed",
    ),
    (
        "find('UNETLoader').widgets[0].value = 'mine.safetensors'",
        ("assumed    wan2.1-1.3b\n           as the model's name tells no size\n",),
        "14b",
    ),
    ("cut(sampler, 'model')", ("assumed    wan2.1-1.3b\n           as no model is connected\n",), "14b"),
    ("demo.connect(0, sampler, 0); graph.convertToSubgraph(new Set([sampler]))", (TINY, "128x128"), "assumed"),
    ("graph.convertToSubgraph(new Set([config]))", (TINY, "128x128"), "assumed"),
    (
        "for (const node of [...graph.nodes]) if (node.subgraph?.nodes.some(n => n.type === 'PackForcingSampler'))"
        " graph.remove(node)",
        ("assumed    832x480, 120 s, wan2.1-1.3b\n           as no sampler is connected\n",),
        "tiny",
    ),
)


def check_plan_over_links(page: Page) -> None:
    """Changes the quick start on the page step by step, and looks at its plan after each."""
    for change, words, never in STEPS:
        page.evaluate("() => {" + _HELPERS + change + "}")
        text = plan_shown(page, *words)
        assert never not in text, change
