"""The harness itself, with core nodes only: server, client, conversion of workflows, browser, set-up."""

from __future__ import annotations

import os
import queue
import struct
import subprocess
import time
from pathlib import Path

import pytest
from comfyui import (
    REPO,
    Client,
    Event,
    PromptRejected,
    WorkflowError,
    parse_binary,
    set_widget,
    widget_names,
    workflow_to_prompt,
)
from frontend import graph_to_prompt, load_workflow, missing_nodes, queue_from_page, screenshot

RED_SQUARE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFF0000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}},
}

# Builds a graph with one of everything the conversion must know. Nodes are made by the frontend, so the saved file is
# what a user would save. It is never run: its models do not exist.
BUILD_ONE_OF_EVERYTHING = """
async () => {
    const app = window.app, graph = app.graph
    graph.clear()
    const add = (type, title) => {
        const node = window.LiteGraph.createNode(type)
        if (title) node.title = title
        graph.add(node)
        return node
    }
    const set = (node, name, value) => { node.widgets.find(widget => widget.name === name).value = value }
    const input = (node, name) => node.inputs.findIndex(slot => slot.name === name)

    const loader = add('CheckpointLoaderSimple')
    const lora = add('LoraLoader')          // bypassed: its inputs are passed on, by type
    const positive = add('CLIPTextEncode', 'What to show'), negative = add('CLIPTextEncode')
    const size = add('PrimitiveInt')        // a node whose output feeds a widget
    const latent = add('EmptyLatentImage')
    const seed = add('PrimitiveNode')       // the frontend's own: its value goes into the widget
    const sampler = add('KSampler'), advanced = add('KSamplerAdvanced')
    const reroute = add('Reroute')
    const decode = add('VAEDecode'), muted = add('VAEDecode', 'Muted')
    const image = add('LoadImage'), batch = add('ImageBatch')
    const video = add('CreateVideo'), save = add('SaveVideo')       // V3 nodes, combos and an optional input
    const unlinked = add('SaveImage')
    const sigmas = add('KarrasScheduler'), custom = add('SamplerCustom'), pick = add('KSamplerSelect')
    const note = add('Note'), markdown = add('MarkdownNote')

    loader.connect(0, lora, 0)
    loader.connect(1, lora, 1)
    lora.mode = 4
    lora.connect(0, sampler, 0)
    loader.connect(0, advanced, 0)
    lora.connect(1, positive, input(positive, 'clip'))
    loader.connect(1, negative, input(negative, 'clip'))
    set(positive, 'text', 'a cat,\\n"quoted"')
    size.connect(0, latent, input(latent, 'width'))
    set(latent, 'height', 384)
    for (const node of [sampler, advanced]) {
        positive.connect(0, node, input(node, 'positive'))
        negative.connect(0, node, input(node, 'negative'))
        latent.connect(0, node, input(node, 'latent_image'))
    }
    seed.connect(0, advanced, input(advanced, 'noise_seed'))
    seed.widgets[0].value = 99
    set(loader, 'ckpt_name', 'wan.safetensors')
    set(image, 'image', 'cat.png')
    set(sampler, 'seed', 1234567890123)
    set(sampler, 'control_after_generate', 'fixed')
    set(sampler, 'steps', 7)
    set(sampler, 'sampler_name', 'uni_pc')
    set(sampler, 'denoise', 0.25)
    set(advanced, 'return_with_leftover_noise', 'enable')
    sampler.connect(0, reroute, 0)
    reroute.connect(0, decode, 0)
    loader.connect(2, decode, 1)
    advanced.connect(0, muted, 0)
    loader.connect(2, muted, 1)
    muted.mode = 2
    decode.connect(0, batch, 0)
    image.connect(0, batch, 1)
    batch.connect(0, video, 0)
    muted.connect(0, unlinked, 0)
    set(video, 'fps', 16)
    video.connect(0, save, 0)
    set(save, 'filename_prefix', 'video/all')
    sigmas.connect(0, custom, input(custom, 'sigmas'))
    pick.connect(0, custom, input(custom, 'sampler'))
    set(custom, 'add_noise', false)
    set(custom, 'cfg', 3.5)
    note.widgets[0].value = 'not run'
    markdown.widgets[0].value = '# not run'
    await new Promise(resolve => setTimeout(resolve, 200))
    return graph.serialize()
}
"""


def small_workflow() -> dict:
    """A workflow file as the frontend saves it: a red square, scaled, saved."""
    return {
        "last_node_id": 3, "last_link_id": 2, "version": 0.4, "groups": [], "config": {}, "extra": {},
        "nodes": [
            {
                "id": 1, "type": "EmptyImage", "pos": [50, 100], "size": [270, 130], "flags": {}, "order": 0, "mode": 0,
                "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "properties": {},
                "widgets_values": [32, 48, 1, 0xFF0000],
            },
            {
                "id": 2, "type": "ImageInvert", "pos": [380, 100], "size": [200, 30], "flags": {}, "order": 1,
                "mode": 0,
                "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
                "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}], "properties": {},
            },
            {
                "id": 3, "type": "SaveImage", "pos": [640, 100], "size": [315, 270], "flags": {}, "order": 2, "mode": 0,
                "inputs": [{"name": "images", "type": "IMAGE", "link": 2}], "outputs": [], "properties": {},
                "widgets_values": ["dropped"],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    }  # fmt: skip


def test_a_prompt_runs_and_its_file_comes_back(server, client):
    result = client.run(RED_SQUARE).raise_for_status()
    [image] = result.outputs["2"]["images"]
    assert client.download(image) == (server.base_dir / "output" / image["filename"]).read_bytes()


def test_events_of_a_run_arrive_in_order(client):
    seen = []
    changed = {**RED_SQUARE, "1": {**RED_SQUARE["1"], "inputs": {**RED_SQUARE["1"]["inputs"], "color": 1}}}
    result = client.run(changed, on_event=seen.append)
    assert [e.data["node"] for e in result.of_type("executing")] == ["1", "2", None]
    assert [e.data["node"] for e in result.of_type("executed")] == ["2"]
    assert result.of_type("progress_state")
    assert seen == result.events
    assert all(isinstance(event, Event) for event in seen)


def test_an_error_in_a_node_is_told(client):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "ImageFromBatch", "inputs": {"image": ["1", 0], "batch_index": 0, "length": 1}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "4": {"class_type": "ImageToMask", "inputs": {"image": ["2", 0], "channel": "alpha"}},
        "5": {"class_type": "MaskPreview", "inputs": {"mask": ["4", 0]}},
    }
    result = client.run(prompt)
    assert result.status == "error"
    assert "ImageToMask (node 4)" in result.error_message


def test_an_invalid_prompt_is_refused_with_its_reason(client):
    with pytest.raises(PromptRejected) as refused:
        client.run({"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}})
    assert "SaveImage (node 1)" in refused.value.summary


def test_conversion_equals_the_frontends(page, client):
    workflow = page.evaluate(BUILD_ONE_OF_EVERYTHING)
    expected = graph_to_prompt(page)["output"]
    assert len(expected) == 16
    assert expected["9"]["inputs"]["noise_seed"] == 99  # the Primitive's
    assert workflow_to_prompt(workflow, client.object_info()) == expected


def test_widgets_are_set_by_name(client):
    info, workflow = client.object_info(), small_workflow()
    assert widget_names(info["KSampler"])[:3] == ["seed", None, "steps"]
    set_widget(workflow["nodes"][0], info["EmptyImage"], "height", 16)
    assert workflow_to_prompt(workflow, info)["1"]["inputs"]["height"] == 16
    with pytest.raises(WorkflowError, match="no widget 'depth'"):
        set_widget(workflow["nodes"][0], info["EmptyImage"], "depth", 16)


CODEC = {
    "options": [
        {"key": "auto", "inputs": {}},
        {"key": "h264", "inputs": {"required": {"crf": ["INT", {"default": 20}]}}},
    ]
}
# Save Video as Comfy-Org/ComfyUI has it since August 2026 (comfy_extras/nodes_video.py): combos within a combo, and a
# hidden one for prompts from before.
SAVE_VIDEO = {
    "input": {
        "required": {
            "video": ["VIDEO", {}],
            "filename_prefix": ["STRING", {"default": "video/ComfyUI"}],
            "format": [
                "COMFY_DYNAMICCOMBO_V3",
                {"options": [{"key": "auto", "inputs": {"required": {"codec": ["COMFY_DYNAMICCOMBO_V3", CODEC]}}}]},
            ],
            "last": ["BOOLEAN", {"default": True}],
        },
        "optional": {"codec": ["COMFY_DYNAMICCOMBO_V3", {**CODEC, "hidden": True}]},
    }
}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (["a", "auto", "auto", False], {"format": "auto", "format.codec": "auto", "last": False}),
        (["a", "auto", "h264", 30], {"format": "auto", "format.codec": "h264", "format.codec.crf": 30, "last": True}),
        (["a"], {"format": "auto", "format.codec": "auto", "last": True}),
    ],
)
def test_the_widgets_below_a_dynamic_combo_are_those_of_its_choice(saved: list, expected: dict):
    node = {"id": 1, "type": "SaveVideo", "widgets_values": saved}
    prompt = workflow_to_prompt({"nodes": [node]}, {"SaveVideo": SAVE_VIDEO})
    assert prompt["1"]["inputs"] == {"filename_prefix": "a", **expected}


def test_a_widget_below_a_dynamic_combo_is_set_by_its_name():
    node = {"id": 1, "type": "SaveVideo", "widgets_values": ["a", "auto", "h264", 30, True]}
    set_widget(node, SAVE_VIDEO, "format.codec.crf", 10)
    set_widget(node, SAVE_VIDEO, "last", False)
    assert node["widgets_values"] == ["a", "auto", "h264", 10, False]


def test_a_dropped_workflow_loads_and_runs(page, client, server, tmp_path):
    load_workflow(page, small_workflow())
    assert missing_nodes(page) == []
    assert graph_to_prompt(page)["output"] == workflow_to_prompt(small_workflow(), client.object_info())
    run = queue_from_page(page)
    assert run["status"] == "success"
    assert client.history(run["prompt_id"])["outputs"]["3"]["images"][0]["filename"].startswith("dropped")
    assert screenshot(page, tmp_path / "page.png").stat().st_size > 10_000


def test_a_workflow_with_an_unknown_node_says_so(page, client):
    workflow = small_workflow()
    workflow["nodes"][1]["type"] = "NobodyHasThis"
    load_workflow(page, workflow)
    assert missing_nodes(page) == ["NobodyHasThis"]
    with pytest.raises(WorkflowError, match="NobodyHasThis"):
        workflow_to_prompt(workflow, client.object_info())


def test_core_nodes_load_without_a_complaint(server):
    """So that a complaint in the log can only be the pack's."""
    core = server.log.partition("Import times for custom nodes")[0]
    assert "comfy_extras" not in core, core


def finished(messages: list, *events: Event) -> Client:
    """A connection to a server whose record of a prompt ends as an error with these messages."""
    client = Client.__new__(Client)
    client._messages = queue.Queue()
    for event in (*events, Event("executing", {"node": None, "prompt_id": "p"}, 0.0)):
        client._messages.put(event)
    client.history = lambda prompt: {"outputs": {}, "status": {"status_str": "error", "messages": messages}}
    return client


def test_a_record_whose_messages_are_text_is_read():
    """hiddenswitch/ComfyUI (January 2026), comfy/cmd/main.py: "KIND: MESSAGE" in place of [KIND, DATA]."""
    text = ["execution_start", "execution_error: there is no room"]
    assert finished(text).wait("p").error_message == "a node (node ?): there is no room"
    data = {"node_type": "KSampler", "node_id": "3", "exception_message": "there is no room", "prompt_id": "p"}
    seen = Event("execution_error", data, 0.0)
    assert finished(text, seen).wait("p").error_message == "KSampler (node 3): there is no room"
    assert finished(["execution_interrupted"]).wait("p").status == "interrupted"
    listed = [["execution_start", {}], ["execution_error", data]]
    assert finished(listed).wait("p").error == data


def test_a_text_for_a_node_is_an_event():
    event = parse_binary(struct.pack(">II", 3, 2) + "12möglich".encode())
    assert (event.type, event.data) == ("progress_text", {"node": "12", "text": "möglich"})


@pytest.mark.parametrize(("file", "told"), [("main.py", "not everything is set up"), ("x.py", "it has no main.py")])
def test_a_comfyui_needs_no_requirements_to_be_tested_against(tmp_path: Path, file: str, told: str):
    (tmp_path / file).touch()
    script = ["bash", str(REPO / "scripts" / "setup.sh"), "--check"]
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    assert told in done.stderr
    assert "requirements.txt" not in done.stderr


def test_the_second_set_up_does_nothing():
    script = ["bash", str(REPO / "scripts" / "setup.sh")]
    # Asked first, because a set-up that has something to do must not do it under running tests.
    assert subprocess.run([*script, "--check"]).returncode == 0
    began = time.monotonic()
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert time.monotonic() - began < 2
