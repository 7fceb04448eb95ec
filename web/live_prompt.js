// The Live Prompt node: a button that says what stands in its box, and what every open tab is told of it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LIVE = "PackForcingLivePrompt";
const PATH = "/packforcing/live_prompt";
const EVENT = "packforcing.live";
const STATUS_HEIGHT = 120; // pixels
const IDLE = "Press Run. While the sampler works, write above what the video shall show and press the button.";

const nodes = new Set(); // the Live Prompt nodes of the graph that is open
const channels = new Map(); // the newest that the server told of each, by the node's id and its workflow's

const key = (channel) => `${channel.workflow}/${channel.node_id}`;

// A workflow's id, by which tabs with other workflows tell that they are not meant; "" in frontends without one.
const workflowOf = (node) => (node.graph?.rootGraph ?? app.graph)?.id ?? "";

// The server calls a node in a subgraph "5:12", the frontend 12.
function channelOf(node) {
  const own = [...channels.values()].filter((channel) => {
    const named = String(channel.node_id).split(":").at(-1) === String(node.id);
    return named && (!channel.workflow || !workflowOf(node) || channel.workflow === workflowOf(node));
  });
  return own.find((channel) => channel.running) ?? own.at(-1);
}

function statusText(channel) {
  if (!channel) return IDLE;
  const lines = [channel.story];
  if (channel.waiting) lines.push(`waits for the next block: ${channel.waiting}`);
  if (channel.refused) lines.push(channel.refused);
  lines.push(channel.running ? "The sampler listens." : "The video is over. The lines above are its story.");
  return lines.join("\n");
}

function addStatus(node) {
  const element = document.createElement("pre");
  element.style.cssText =
    "margin:0;padding:6px 8px;overflow:auto;box-sizing:border-box;width:100%;height:100%;white-space:pre-wrap;" +
    "font:11px/1.35 ui-monospace,monospace;color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);" +
    "border-radius:6px;user-select:text";
  const widget = node.addDOMWidget("status", "packforcing_text", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => STATUS_HEIGHT,
    getMaxHeight: () => STATUS_HEIGHT,
  });
  widget.serialize = false;
  return element;
}

function show(node) {
  node.packforcingStatus.textContent = statusText(channelOf(node));
  node.packforcingStatus.scrollTop = node.packforcingStatus.scrollHeight;
}

function hear(channel) {
  channels.delete(key(channel)); // so that the newest is the last
  channels.set(key(channel), channel);
  nodes.forEach(show);
}

async function say(node) {
  const text = node.widgets.find((widget) => widget.name === "text")?.value ?? "";
  const body = JSON.stringify({ node_id: String(node.id), text, workflow: workflowOf(node) });
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await api.fetchApi(PATH, { method: "POST", headers, body });
    const told = await answer.json();
    if (answer.ok) hear(told);
    else node.packforcingStatus.textContent = told.error;
  } catch (error) {
    node.packforcingStatus.textContent = "The server does not answer; nothing was said.";
  }
}

// For a tab that was opened, or lost the server, while a sampler runs.
async function askChannels() {
  try {
    const { channels: open } = await (await api.fetchApi(PATH)).json();
    const running = new Set(open.map(key));
    for (const channel of channels.values()) channel.running &&= running.has(key(channel));
    open.forEach(hear);
    nodes.forEach(show);
  } catch (error) {
    // the server is away; asked again when it is back
  }
}

// ComfyUI may serve this file twice, under the pack's name and under its folder's.
const NAME = "PackForcing.LivePrompt";
const alreadyHere = app.extensions?.some((extension) => extension.name === NAME);

if (!alreadyHere) app.registerExtension({
  name: NAME,
  async setup() {
    api.addEventListener(EVENT, ({ detail }) => hear(detail));
    api.addEventListener("reconnected", askChannels);
    await askChannels();
  },
  nodeCreated(node) {
    if ((node.comfyClass ?? node.type) !== LIVE) return;
    const button = node.addWidget("button", "Say it", null, () => say(node), { serialize: false });
    button.serialize = false;
    node.packforcingStatus = addStatus(node);
    nodes.add(node);
    const removed = node.onRemoved;
    node.onRemoved = function () {
      nodes.delete(node);
      return removed?.apply(this, arguments);
    };
    setTimeout(() => show(node)); // when it has its id
  },
});
