// What the pack's nodes show on themselves: the plan of a Cache Config or Cache Preset and the Prompt Schedule's times,
// live, and the Cache Inspector's report.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes, feed, inputIndex, isActive, isSame, valueOf } from "./graph.js";

const CONFIGS = ["PackForcingCacheConfig", "PackForcingCachePreset"];
const SCHEDULE = "PackForcingPromptSchedule";
const SAMPLER = "PackForcingSampler";
const INSPECTOR = "PackForcingCacheInspector";
const DEMO = "PackForcingDemoModels";

const TEXT_WIDGET = "packforcing_text";
const WEIGHTS_FILE = /\.(safetensors|sft|pt|pth|ckpt|bin|gguf)$/i;
const MODEL_NAMES = { "wan2.1-14b": /14b/i, "wan2.1-1.3b": /1[._-]?3b|self_forcing/i }; // the first that fits
const EMPTY_LATENTS = /^(EmptyHunyuanLatentVideo|EmptyARVideoLatent|Wan\w*ToVideo)$/;
const MOST_MODEL_NODES = 32;

const PLAN_DELAY_MS = 200; // one request for a burst of edits
const PLAN_CHECK_MS = 1000; // how often edits of *other* nodes (size, length) are noticed

function addText(node, name, height) {
  const element = document.createElement("pre");
  element.style.cssText =
    "margin:0;padding:6px 8px;overflow:auto;box-sizing:border-box;width:100%;height:100%;white-space:pre;" +
    "font:11px/1.25 ui-monospace,monospace;color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);" +
    `border-radius:6px;user-select:text;max-height:${height}px`; // Nodes 2.0 knows no getMaxHeight
  const widget = node.addDOMWidget(name, TEXT_WIDGET, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  return element;
}

// The model at the start of a chain of MODEL nodes (LoRA loaders and such between), by what its loader's file is called.
function modelOf(sampler) {
  let node = sampler;
  for (let hops = 0; hops < MOST_MODEL_NODES; hops++) {
    const index = node.inputs?.findIndex((input) => input.type === "MODEL") ?? -1;
    if (index < 0) break;
    const source = feed(node, index);
    if (!source?.node) return { why: source ? "the model is not known" : "no model is connected" };
    node = source.node;
    if (node.type === DEMO) return { model: "tiny" };
  }
  const file = node.widgets?.map((widget) => String(widget.value)).find((value) => WEIGHTS_FILE.test(value)) ?? "";
  const [model] = Object.entries(MODEL_NAMES).find(([, names]) => names.test(file)) ?? [];
  return model ? { model } : { why: "the model's name tells no size" };
}

// Size and length, which an empty latent may set in place of the widgets.
function frameOf(sampler) {
  const source = feed(sampler, inputIndex(sampler, "latent"));
  if (!source) {
    const [width, height, seconds] = ["width", "height", "seconds"].map((name) => valueOf(sampler, name));
    return { width, height, seconds, why: "other nodes compute it" };
  }
  const latent = EMPTY_LATENTS.test(source.node?.type) ? source.node : { widgets: [] };
  const [width, height, length] = ["width", "height", "length"].map((name) => valueOf(latent, name));
  const latent_frames = length === undefined ? undefined : Math.floor((length - 1) / 4) + 1;
  return { width, height, latent_frames, why: "the latent sets size and length" };
}

// What can be read of the video that a sampler makes, and why the rest cannot.
function videoOf(sampler) {
  if (!sampler) return { why: "no sampler is connected" };
  const { why: whyFrame, ...frame } = frameOf(sampler);
  const { why: whyModel, ...model } = modelOf(sampler);
  const values = { ...frame, fps: valueOf(sampler, "fps"), ...model };
  const whyValues = Object.values(values).includes(undefined) ? whyFrame : undefined;
  return { ...values, why: [whyValues, whyModel].filter(Boolean).join("; ") };
}

function queryOf(values) {
  return new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined && value !== ""));
}

function samplersWith(isTheirs, graph) {
  return allNodes(graph).filter((node) => node.type === SAMPLER && isActive(node) && isTheirs(node));
}

// The Cache Config or Cache Preset of a sampler.
function configOf(sampler) {
  return feed(sampler, inputIndex(sampler, "cache_config"))?.node;
}

function planQuery(node) {
  const names = node.widgets.filter((widget) => widget.type !== TEXT_WIDGET).map((widget) => widget.name);
  const values = Object.fromEntries(names.map((name) => [name, valueOf(node, name)]));
  const linked = names.filter((name) => values[name] === undefined).join(",");
  const samplers = samplersWith((sampler) => isSame(configOf(sampler), node), node.graph);
  const [query, ...others] = (samplers.length ? samplers : [undefined]).map((sampler) =>
    queryOf({ ...values, linked, ...videoOf(sampler) }).toString(),
  );
  return others.every((other) => other === query) ? query : `${query}&samplers=${samplers.length}`;
}

// Whether a node's conditioning is made from a schedule's, also through nodes that combine it with others.
function isMadeFrom(schedule, node, seen = []) {
  if (isSame(node, schedule)) return true;
  if (!node || seen.some((each) => isSame(each, node))) return false;
  seen.push(node);
  return [...(node.inputs ?? []).entries()]
    .filter(([, input]) => input.type === "CONDITIONING")
    .some(([index]) => isMadeFrom(schedule, feed(node, index)?.node, seen));
}

function storyQuery(node) {
  const text = valueOf(node, "text") ?? "";
  const [sampler] = samplersWith((each) => isMadeFrom(node, each), node.graph);
  const { fps, seconds, latent_frames } = sampler ? videoOf(sampler) : {};
  const config = sampler && configOf(sampler);
  const [block_frames, preset] = ["block_frames", "preset"].map((name) => config && valueOf(config, name));
  const countable = (block_frames ?? preset) !== undefined && fps !== undefined;
  if (!countable) return queryOf({ text }).toString();
  const length = seconds ?? (latent_frames && (latent_frames * 4) / fps);
  return queryOf({ text, block_frames, preset, fps, seconds: length }).toString();
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
    if (CONFIGS.includes(type)) showAnswer(node, "plan", 176, planQuery, askPlan);
    if (type === SCHEDULE) showAnswer(node, "times", 140, storyQuery, askStory);
    if (type === INSPECTOR) showReport(node);
  },
});
