"""Turns a workflow file (what the frontend saves and a user drags in) into a prompt (what the server runs).

The frontend does this in the browser; a headless run needs it too. The rules are the frontend's: widgets take the
saved values in the order the node declares its inputs, links override widgets, muted nodes fall out, bypassed nodes
and reroutes are walked through. Not covered, and refused: subgraphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

NEVER, BYPASS = 2, 4  # litegraph's node modes
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "IMAGECOMPARE", "BOUNDING_BOX")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
_MISSING = object()

Declared = tuple[str, str, dict]  # name, type, options
Widget = tuple[str | None, str, dict]


class WorkflowError(ValueError):
    """A workflow that cannot be turned into a prompt; the message says which node and why."""


def workflow_to_prompt(workflow: dict, object_info: dict) -> dict[str, dict]:
    """Convert a workflow in UI format to the API prompt.

    `object_info` is the server's description of every node (`Client.object_info()`).
    """
    graph = _Graph(workflow)
    prompt: dict[str, dict] = {}
    for node in graph.execution_order():
        if node["type"] in (*NOTES, "Reroute", "PrimitiveNode") or node.get("mode", 0) in (NEVER, BYPASS):
            continue
        info = object_info.get(node["type"])
        if info is None:
            raise WorkflowError(f"Node {node['id']} is a {node['type']!r}, which this server does not have.")
        inputs = _widget_inputs(node, info)
        inputs.update(graph.linked_inputs(node))
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": node.get("title") or info.get("display_name") or node["type"]},
        }
    for entry in prompt.values():  # links to nodes that fell out
        entry["inputs"] = {
            name: value
            for name, value in entry["inputs"].items()
            if not (isinstance(value, list) and value[0] not in prompt)
        }
    return prompt


def widget_names(info: dict, saved: Sequence[Any] = ()) -> list[str | None]:
    """The names of a node's widgets in the order of `widgets_values`.

    None stands for a value that is saved but belongs to the frontend alone ("fixed", "randomize", ...). `saved` are the
    values: a dynamic combo has other widgets below it for each choice.
    """
    return [name for name, _, _ in _widgets(_declared_inputs(info), saved)]


def set_widget(node: dict, info: dict, name: str, value: Any) -> None:
    """Change one saved widget value of a workflow's node, by name."""
    if isinstance(node.get("widgets_values"), dict):
        node["widgets_values"][name] = value
        return
    names = widget_names(info, node.get("widgets_values") or [])
    if name not in names:
        raise WorkflowError(f"Node {node['id']} ({node['type']}) has no widget {name!r}; it has {names}.")
    values = node.setdefault("widgets_values", [])
    position = names.index(name)
    if position >= len(values):
        raise WorkflowError(f"Node {node['id']} ({node['type']}) was saved without a value for {name!r}.")
    values[position] = value


def _declared_inputs(info: dict) -> Iterator[Declared]:
    """Every (name, type, options) in the order the node declares them; the type of a list of choices is COMBO."""
    for group in ("required", "optional"):
        specs = info["input"].get(group) or {}
        for name in (info.get("input_order") or {}).get(group) or specs:
            spec = specs[name]
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
            if isinstance(spec[0], list):
                yield name, "COMBO", {"options": spec[0], **options}
            else:
                yield name, options.get("widgetType", spec[0]), options


def _widgets(declared: Iterable[Declared], saved: Sequence[Any], prefix: str = "") -> list[Widget]:
    """(name, type, options) of each value that the frontend saves; the name is None for the frontend's own.

    A dynamic combo comes as a combo, and after it the widgets of its choice, as "COMBO.WIDGET".
    """
    widgets: list[Widget] = []
    for name, kind, options in declared:
        if kind == DYNAMIC_COMBO and not options.get("hidden"):
            choices = {option["key"]: option["inputs"] for option in options["options"]}
            chosen = saved[len(widgets)] if len(widgets) < len(saved) else next(iter(choices))
            widgets.append((prefix + name, "COMBO", {"options": list(choices)}))
            below = _declared_inputs({"input": choices.get(chosen, {})})
            widgets += _widgets(below, saved[len(widgets) :], f"{prefix}{name}.")
        elif _is_widget(kind, options):
            widgets.append((prefix + name, kind, options))
            widgets += [(None, kind, options)] * _own_values(name, kind, options)
    return widgets


def _own_values(name: str, kind: str, options: dict) -> int:
    """How many values of its own the frontend saves behind an input's."""
    # By name as well: the frontend gives a control to every integer called seed.
    control = options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed"))
    upload = any(options.get(f"{what}_upload") for what in ("image", "video", "audio"))  # the button
    return bool(control) * (1 + (kind == "COMBO")) + upload  # a combo's control has a filter


def _is_widget(kind: str, options: dict) -> bool:
    return kind in WIDGET_TYPES and not options.get("forceInput")


def _default(kind: str, options: dict) -> Any:
    """The value a fresh node of the frontend shows."""
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        return next(iter(options.get("options") or []), None)
    return {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}.get(kind)


def _widget_inputs(node: dict, info: dict) -> dict[str, Any]:
    saved = node.get("widgets_values") or []
    in_order = [] if isinstance(saved, dict) else saved
    widgets = _widgets(_declared_inputs(info), in_order)
    by_name = saved if isinstance(saved, dict) else dict(zip((name for name, _, _ in widgets), in_order, strict=False))
    inputs = {}
    for name, kind, options in widgets:
        if name is None:
            continue
        value = by_name.get(name, _MISSING)
        value = _default(kind, options) if value is _MISSING else value
        # A bare list in a prompt means a link, so a list as a value travels wrapped.
        inputs[name] = {"__value__": value} if isinstance(value, list) else value
    return inputs


class _Graph:
    """The nodes and links of one workflow, and the way back from an input to the node that feeds it."""

    def __init__(self, workflow: dict):
        if "nodes" not in workflow:
            raise WorkflowError("This is not a workflow in UI format: it has no 'nodes'.")
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        subgraphs = {s["id"] for s in (workflow.get("definitions") or {}).get("subgraphs") or []}
        for node in self.nodes.values():
            if node["type"] in subgraphs:
                raise WorkflowError(f"Node {node['id']} is a subgraph, which a headless run does not unpack.")
        self.links = {}  # link id -> (origin node, origin slot)
        for link in workflow.get("links") or []:
            if isinstance(link, dict):
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.links[link[0]] = (link[1], link[2])

    def execution_order(self) -> list[dict]:
        """Nodes in the order the frontend saved; the server does not care, readers of the prompt do."""
        return sorted(self.nodes.values(), key=lambda node: node.get("order", 0))

    def linked_inputs(self, node: dict) -> dict[str, Any]:
        """What the links into `node` give: [node id, slot] for each, or the value of a Primitive."""
        inputs = {}
        for slot in node.get("inputs") or []:
            value = self._follow(slot.get("link"))
            if value is not None:
                inputs[slot["name"]] = value
        return inputs

    def _follow(self, link_id: int | None) -> Any:
        """The [id, slot] at the far end of a link, through reroutes and bypassed nodes; None when nothing is there."""
        if link_id is None or link_id not in self.links:
            return None
        origin_id, origin_slot = self.links[link_id]
        origin = self.nodes.get(origin_id)
        if origin is None:
            return None
        if origin.get("mode", 0) == NEVER:
            return [str(origin_id), int(origin_slot)]  # taken out with the muted node, below
        if origin["type"] == "PrimitiveNode":
            return (origin.get("widgets_values") or [None])[0]
        if origin["type"] == "Reroute":
            return self._follow(origin["inputs"][0].get("link"))
        if origin.get("mode", 0) == BYPASS:
            return self._through(origin, origin_slot)
        return [str(origin_id), int(origin_slot)]

    def _through(self, node: dict, slot: int) -> Any:
        """What a bypassed node's output passes on: the input of the same type, the one at the same place first."""
        inputs, wanted = node.get("inputs") or [], node["outputs"][slot]["type"]
        for index in (slot, *range(len(inputs))):
            if index < len(inputs) and inputs[index]["type"] == wanted:
                return self._follow(inputs[index].get("link"))
        return None
