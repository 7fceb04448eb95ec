// What the pack's nodes show on themselves: the Cache Config's plan and the Prompt Schedule's times, live, and the
// Cache Inspector's report.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const CONFIG = "PackForcingCacheConfig";
const SCHEDULE = "PackForcingPromptSchedule";
const SAMPLER = "PackForcingSampler";
const INSPECTOR = "PackForcingCacheInspector";
const DEMO = "PackForcingDemoModels";

const PLAN_DELAY_MS = 200; // one request for a burst of edits
const PLAN_CHECK_MS = 1000; // how often edits of *other* nodes (size, length) are noticed

function addText(node, name, height) {
  const element = document.createElement("pre");
  element.style.cssText =
    "margin:0;padding:6px 8px;overflow:auto;box-sizing:border-box;width:100%;height:100%;white-space:pre;" +
    "font:11px/1.35 ui-monospace,monospace;color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);" +
    "border-radius:6px;user-select:text";
  const widget = node.addDOMWidget(name, "packforcing_text", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  return element;
}

function widgetValue(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

// The node at the other end of an input's link, or undefined.
function source(node, inputName) {
  const input = node.inputs?.find((slot) => slot.name === inputName);
  const link = input?.link == null ? undefined : node.graph?.links?.[input.link];
  return link && node.graph.getNodeById(link.origin_id);
}

function targets(node) {
  const links = node.outputs?.[0]?.links ?? [];
  return links.map((id) => node.graph?.getNodeById(node.graph.links[id]?.target_id)).filter(Boolean);
}

// The model at the start of a chain of MODEL nodes (LoRA loaders and such between).
function modelOf(sampler) {
  let node = sampler;
  for (let hops = 0; hops < 32 && node; hops++) {
    node = source(node, "model");
    if (node?.type === DEMO) return "tiny";
  }
  return "wan2.1-1.3b";
}

function planQuery(node) {
  const query = new URLSearchParams();
  for (const widget of node.widgets ?? []) {
    if (widget.type !== "packforcing_text") query.set(widget.name, widget.value);
  }
  const sampler = targets(node).find((target) => target.type === SAMPLER);
  if (sampler) {
    for (const name of ["width", "height", "seconds", "fps"]) {
      const value = widgetValue(sampler, name);
      if (value !== undefined) query.set(name, value);
    }
    query.set("model", modelOf(sampler));
  }
  return query.toString();
}

// The sampler that a schedule's conditioning reaches, also through nodes that combine it with others.
function samplerOf(schedule) {
  const reached = [schedule];
  for (let i = 0; i < reached.length && i < 32; i++) {
    for (const target of targets(reached[i])) {
      if (target.type === SAMPLER) return target;
      if (!reached.includes(target)) reached.push(target);
    }
  }
}

function storyQuery(node) {
  const query = new URLSearchParams({ text: widgetValue(node, "text") ?? "" });
  const sampler = samplerOf(node);
  for (const name of sampler ? ["seconds", "fps"] : []) query.set(name, widgetValue(sampler, name));
  const frames = sampler && widgetValue(source(sampler, "cache_config") ?? {}, "block_frames");
  if (frames !== undefined) query.set("block_frames", frames);
  return query.toString();
}

const askPlan = (query) => api.fetchApi(`/packforcing/plan?${query}`);
const askStory = (query) => api.fetchApi("/packforcing/story", { method: "POST", body: new URLSearchParams(query) });

// Shows on a node what the server answers to a question about widgets, and asks again whenever that changes.
function showAnswer(node, name, height, question, ask) {
  const element = addText(node, name, height);
  element.textContent = "…";
  let shown = null;
  let pending = null;
  const refresh = async () => {
    pending = null;
    if (!node.graph) return;
    const query = question(node);
    if (query === shown) return;
    shown = query;
    try {
      const answer = await (await ask(query)).json();
      if (query === shown) element.textContent = answer.text ?? answer.error;
    } catch (error) {
      shown = null; // the server is away; asked again at the next check
    }
  };
  const timer = setInterval(() => (pending ??= setTimeout(refresh, PLAN_DELAY_MS)), PLAN_CHECK_MS);
  const removed = node.onRemoved;
  node.onRemoved = function () {
    clearInterval(timer);
    return removed?.apply(this, arguments);
  };
  setTimeout(refresh, PLAN_DELAY_MS);
}

function showReport(node) {
  const element = addText(node, "report", 320);
  element.textContent = "Run the workflow to see the report.";
  const executed = node.onExecuted;
  node.onExecuted = function (message) {
    if (message?.text) element.textContent = [].concat(message.text).join("");
    return executed?.apply(this, arguments);
  };
}

// ComfyUI may serve this file twice, under the pack's name and under its folder's.
const NAME = "PackForcing";
const alreadyHere = app.extensions?.some((extension) => extension.name === NAME);

if (!alreadyHere) app.registerExtension({
  name: NAME,
  nodeCreated(node) {
    const type = node.comfyClass ?? node.type;
    if (type === CONFIG) showAnswer(node, "plan", 176, planQuery, askPlan);
    if (type === SCHEDULE) showAnswer(node, "times", 140, storyQuery, askStory);
    if (type === INSPECTOR) showReport(node);
  },
});
