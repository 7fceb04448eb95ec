// Where a value in the graph comes from: past reroutes, bypassed nodes and primitives, in and out of subgraphs.

const SUBGRAPH_INPUTS = -10; // the id by which links inside a subgraph name its inputs
const MUTED = 2;
const BYPASSED = 4;
const MOST_HOPS = 100; // a graph may hold a circle

// Every node of the workflow, those inside subgraphs too.
export function allNodes(graph) {
  const root = graph.rootGraph ?? graph;
  return [root, ...(root.subgraphs?.values() ?? [])].flatMap((each) => [...each.nodes]);
}

export function isActive(node) {
  return node.mode !== MUTED && node.mode !== BYPASSED;
}

// By their ids: the page may hand out one node under several wrappers.
export function isSame(a, b) {
  return a?.id === b?.id && a?.graph?.id === b?.graph?.id;
}

// What feeds an input: { node, slot } that makes it, { widget } that holds it, {} where that cannot be told, or
// undefined where nothing is connected.
export function feed(node, index, hops = MOST_HOPS) {
  if (!node.inputs?.[index]) return undefined;
  const link = node.getInputLink(index);
  if (link) return follow(node.graph, link, hops);
  const { name, widget } = node.inputs[index];
  const own = widgetOf(node, widget?.name ?? name);
  return own && { widget: own };
}

function follow(graph, link, hops) {
  if (hops === 0) return {};
  if (Number(link.origin_id) !== SUBGRAPH_INPUTS) {
    return made(graph.getNodeById(link.origin_id), link.origin_slot, hops - 1);
  }
  const hosts = allNodes(graph).filter((node) => node.subgraph?.id === graph.id);
  return hosts.length === 1 ? feed(hosts[0], link.origin_slot, hops - 1) : {}; // several may differ
}

function made(node, slot, hops) {
  if (!node || node.mode === MUTED) return {};
  if (node.mode === BYPASSED) {
    const type = node.outputs[slot]?.type;
    const index = [slot, ...node.inputs.keys()].find((i) => node.inputs[i]?.type === type);
    return index === undefined ? {} : (feed(node, index, hops) ?? {});
  }
  if (node.subgraph) {
    const link = node.subgraph.getLink(node.subgraph.outputs[slot]?.linkIds[0]);
    return link ? follow(node.subgraph, link, hops) : {};
  }
  if (node.isVirtualNode) {
    const source = node.resolveVirtualOutput?.(slot);
    if (source) return made(source.node, source.slot, hops - 1);
    const link = node.getInputLink(slot);
    if (link) return follow(node.graph, link, hops);
    return node.widgets?.length ? { widget: node.widgets[0] } : {};
  }
  return { node, slot };
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

export function inputIndex(node, name) {
  return node.inputs?.findIndex((input) => input.name === name) ?? -1;
}

// The value that a node's widget will have in a run, or undefined where another node computes it.
export function valueOf(node, name) {
  const source = feed(node, inputIndex(node, name)) ?? { widget: widgetOf(node, name) };
  if (source?.widget) return source.widget.value;
  return source?.node?.type.startsWith("Primitive") ? valueOf(source.node, "value") : undefined;
}
