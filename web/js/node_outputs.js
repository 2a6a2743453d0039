// What our nodes tell the page when they have run; and the same again when nodes were built anew: another workflow was
// in between, or the page was loaded again.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const STORE = "cviv-vae.outputs"; // in the browser's memory of this tab: { workflow: { node: output } }
const STATUS = "$$node-text-preview"; // ComfyUI's widget for what a node says while it runs
const MOST = 2 << 20; // characters that may be kept

const listeners = [];
const kept = stored(); // from before the page was loaded; each workflow gets its own back once

/** Call `show(node, output)` whenever one of our nodes has something to show. */
export function onOutput(show) {
  listeners.push(show);
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

const isOurs = (node) => Boolean(node?.type?.startsWith("CVIV_"));

function tell(node, output) {
  if (output) for (const show of listeners) show(node, output);
}

const workflowNow = () => app.extensionManager?.workflow?.activeWorkflow?.path;
const root = () => app.rootGraph ?? app.graph;
const keyOf = (node) => (node.graph && node.graph !== root() ? `${node.graph.id}:${node.id}` : String(node.id));

/** The node at a key of ComfyUI's output store: its id, inside a subgraph after the subgraph's and a colon. */
function nodeAt(key) {
  const [id, graph] = String(key).split(":").reverse();
  return (graph ? root().subgraphs?.get(graph) : root())?.getNodeById(Number(id));
}

function allNodes(graph = root()) {
  const inside = [...(graph?.subgraphs?.values() ?? [])];
  return [graph, ...inside].flatMap((one) => one?._nodes ?? []);
}

function remember(node, output) {
  const workflow = workflowNow();
  if (!workflow) return;
  const all = stored();
  all[workflow] = { ...all[workflow], [keyOf(node)]: { type: node.type, output } };
  try {
    const text = JSON.stringify(all);
    if (text.length < MOST) sessionStorage.setItem(STORE, text);
    else sessionStorage.removeItem(STORE);
  } catch {
    sessionStorage.removeItem(STORE); // full: what is on the page stays, and only a reload loses it
  }
}

/** Show what the nodes of this workflow told before the page was loaded. */
function bringBack() {
  const workflow = workflowNow();
  const found = kept[workflow];
  delete kept[workflow];
  for (const [key, { type, output }] of Object.entries(found ?? {})) {
    const node = nodeAt(key);
    if (node?.type !== type) continue;
    app.nodeOutputs[key] ??= output; // pictures are drawn from there
    tell(node, output);
  }
}

/** The last words of a run are in its report; of one that was cancelled, nothing is left to say. */
function removeStatus(node) {
  const status = node.widgets?.find((one) => one.name === STATUS);
  if (!status) return;
  node.removeWidget(status);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "cviv-vae.node-outputs",
  setup() {
    const samplers = new Set(); // nodes of others that ours spoke on
    api.addEventListener("cviv-vae.said", ({ detail }) => samplers.add(String(detail.node)));
    for (const name of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(name, () => {
        allNodes().filter((node) => isOurs(node) || samplers.has(String(node.id))).forEach(removeStatus);
        samplers.clear();
      });
    }
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("CVIV_")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const result = before?.call(this, output, ...rest);
      if (output) {
        if (output.text) removeStatus(this);
        remember(this, output);
        tell(this, output);
      }
      return result;
    };
  },
  afterConfigureGraph() {
    requestAnimationFrame(bringBack); // only then the page knows which workflow this is
  },
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) {
      const node = nodeAt(key);
      if (isOurs(node)) tell(node, output);
    }
  },
});
