"""Live Prompt in a real server: words said while the sampler runs, what the record keeps, and who is told."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
import torch
from comfyui import Client, Event, Result, Server
from frontend import open_frontend
from graphs import Prompt, executed, make_latents, saved_latent
from playwright.sync_api import Page

PATH = "/packforcing/live_prompt"
FIRST, SAID, LAST = "a red circle", "a blue square", "a green star"
SECONDS = 8.0  # 32 blocks: long enough to say something within
BARE = {"compressor": None, "vae": None, "seconds": SECONDS}


def post(client: Client, body: Any) -> tuple[int, dict]:
    """What the route answers: its status, and the JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(client.url + PATH, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.load(refusal)


def story_of(prompt: Prompt, text: str) -> list:
    return prompt.add("PackForcingPromptSchedule", clip=prompt.demo()[1], text=text)[0]


class Live:
    """A prompt with a Live Prompt node in the making, and what was heard of it."""

    def __init__(self, client: Client, first: str = f"0:00 {FIRST}", **inputs: Any) -> None:
        self.client = client
        self.prompt = Prompt()
        self.node = self.prompt.add("PackForcingLivePrompt", clip=self.prompt.demo()[1], text="a draft")
        positive = story_of(self.prompt, first)
        given = {"positive": positive, "live_prompt": self.node[0], **BARE, **inputs}
        self.sampler = self.prompt.sampler({"top_k": 0, "recent_frames": 2}, **given)
        self.latent = self.prompt.save_latent(self.sampler[0])
        self.inspector = self.prompt.add("PackForcingCacheInspector", record=self.sampler[2])
        self.shown = self.prompt.add("PreviewAny", source=self.inspector[4])
        self.events: list[dict] = []

    def run(self, *script: tuple[int, list[str]], end: Any = None) -> Result:
        """Runs; says words as soon as so many passes are done. `end` is called after the last of them."""
        waiting = list(script)

        def on_event(event: Any) -> None:
            if not isinstance(event, Event):
                return
            if event.type == "packforcing.live":
                self.events.append(event.data)
            if event.type == "progress" and waiting and event.data["value"] >= waiting[0][0]:
                for words in waiting.pop(0)[1]:
                    assert post(self.client, {"node_id": self.node.id, "text": words})[0] == 200
                if not waiting and end is not None:
                    end()

        return self.client.run(self.prompt.nodes, on_event=on_event)


def latents_of_story(server: Server, client: Client, text: str, **inputs: Any) -> torch.Tensor:
    prompt = Prompt()
    given = {"positive": story_of(prompt, text), **BARE, **inputs}
    return make_latents(server, client, prompt, prompt.sampler({"top_k": 0, "recent_frames": 2}, **given))


@pytest.mark.parametrize("switch", ["keep", "refresh", "blend"])
def test_what_is_said_while_it_runs_rules_and_its_story_makes_the_video_again(
    server: Server, client: Client, switch: str
):
    """Of two words within a block, the last wins. The story comes back from the inspector, as text."""
    live = Live(client, prompt_switch=switch)
    result = live.run((5, [LAST, SAID]), (30, [f"  {LAST}\n"])).raise_for_status()
    made = saved_latent(server, result, live.latent)
    [story] = result.outputs[live.shown.id]["text"]
    lines = story.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [FIRST, SAID, LAST]
    assert lines[0].startswith("0:00 ")
    assert f"3 stretches of 3 prompts, 0 returns; the history at a switch: {switch}" in "".join(
        result.outputs[live.inspector.id]["text"]
    )
    assert torch.equal(latents_of_story(server, client, story, prompt_switch=switch), made)
    assert not torch.equal(latents_of_story(server, client, f"0:00 {FIRST}", prompt_switch=switch), made)
    *before, end = live.events
    assert (before[0]["running"], before[0]["story"]) == (True, f"0:00 {FIRST}")
    assert any(event["waiting"] == SAID for event in before)
    assert (end["running"], end["waiting"], end["story"], end["refused"]) == (False, None, story, "")


def test_every_tab_is_told_and_a_steered_video_is_never_taken_from_the_cache(server: Server, client: Client):
    live = Live(client, seconds=2.0)
    with server.client() as other:
        first = live.run((3, [SAID])).raise_for_status()
        heard = []
        while (event := other.next_event(timeout=2)) is not None:
            if isinstance(event, Event) and event.type == "packforcing.live":
                heard.append(event.data)
    assert heard == live.events
    again = live.run().raise_for_status()
    assert executed(again, live.sampler)
    assert again.outputs[live.shown.id]["text"] == [f"0:00 {FIRST}"]  # nothing was left over from the first run
    assert len(first.outputs[live.shown.id]["text"][0].splitlines()) == 2


def test_cancel_drops_what_waits_and_keeps_a_state_that_knows_what_was_said(server: Server, client: Client):
    live = Live(client)
    result = live.run((5, [SAID]), (30, [LAST]), end=client.interrupt)
    assert result.status == "interrupted"
    assert client.request(PATH) == {"channels": []}
    assert (live.events[-1]["running"], live.events[-1]["waiting"]) == (False, None)
    state = max((server.base_dir / "output").rglob("interrupted *.safetensors"), key=lambda path: path.stat().st_mtime)
    header = state.read_bytes()[8:20_000].decode("latin-1")
    assert SAID in header
    assert {event["prompt_id"] for event in live.events} == {result.prompt_id}
    assert post(client, {"node_id": live.node.id, "text": SAID})[0] == 409


@pytest.mark.parametrize(
    ("node_id", "workflow", "prompt_id", "meant"),
    [
        ("12", "w", "p", True),
        ("12", "", "", True),
        ("5:12", "w", "", True),
        ("2", "w", "", False),  # another node, whose number ends alike
        ("12", "v", "", False),  # the same number in another workflow, open in another tab
        ("12", "w", "q", False),  # of a run that is over
    ],
)
def test_a_tab_reaches_the_node_of_its_own_workflow(pack, node_id: str, workflow: str, prompt_id: str, meant: bool):
    channel = pack.nodes.live.Channel("p", "5:12", "w")  # node 12, in a subgraph
    assert channel.is_meant(node_id, workflow, prompt_id) is meant


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"not json", 400, 'a JSON object with "node_id" and "text"'),
        (["a"], 400, 'a JSON object with "node_id" and "text"'),
        ({"text": "a"}, 400, 'a JSON object with "node_id" and "text"'),
        ({"node_id": "1"}, 400, "must be text, but it is None"),
        ({"node_id": "1", "text": " \n "}, 400, "has no words"),
        ({"node_id": "1", "text": "a" * 10_001}, 400, "at most 10,000"),
        ({"node_id": "1", "text": "a"}, 409, "No video is being made that hears this node"),
        ({"node_id": 1, "text": "a"}, 409, "No video is being made that hears this node"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused(client: Client, body: Any, status: int, sentence: str):
    code, answer = post(client, body)
    assert code == status
    assert sentence in answer["error"]


# --- in the browser --------------------------------------------------------------------------------------------------

_ADD_NODE = """
id => {
    const node = window.LiteGraph.createNode('PackForcingLivePrompt')
    node.id = Number(id)
    window.app.graph.add(node)
    return node.widgets.map(widget => [widget.name, widget.type])
}
"""
_SAY = """
words => {
    const node = window.app.graph.nodes.find(node => node.type === 'PackForcingLivePrompt')
    node.widgets.find(widget => widget.name === 'text').value = words
    node.widgets.find(widget => widget.type === 'button').callback()
}
"""
_STATUS = """
words => {
    const node = window.app.graph.nodes.find(node => node.type === 'PackForcingLivePrompt')
    const text = node.widgets.find(widget => widget.name === 'status').element.innerText
    return text.includes(words) && text
}
"""


def status(page: Page, words: str) -> str:
    """What the node in the browser shows, once it holds some words."""
    return page.wait_for_function(_STATUS, arg=words, timeout=20_000).json_value()


def test_the_button_says_what_is_in_the_box_and_the_node_shows_the_story(server: Server, client: Client, page: Page):
    """Another program runs the prompt; the browser steers it, and goes on to show what came of it."""
    open_frontend(page, server.url)  # anew: the tab has heard of other tests' runs
    live = Live(client)
    widgets = page.evaluate(_ADD_NODE, live.node.id)
    assert [name for name, _ in widgets] == ["text", "Say it", "status"]
    assert widgets[1][1] == "button"
    status(page, "Press Run.")
    page.evaluate(_SAY, SAID)
    status(page, "No video is being made that hears this node")
    result = live.run((3, []), end=lambda: page.evaluate(_SAY, SAID)).raise_for_status()
    [story] = result.outputs[live.shown.id]["text"]
    assert [line.partition(" ")[2] for line in story.splitlines()] == [FIRST, SAID]
    assert status(page, "The video is over") == f"{story}\nThe video is over. The lines above are its story."
    saved = page.evaluate("() => window.app.graph.serialize().nodes[0].widgets_values")
    assert saved[:1] == [SAID]  # the box is kept with the workflow; what the node shows is not
    assert story not in saved
