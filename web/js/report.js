// The report of our nodes, kept on the node: what ran, in which tiles, how long, how much memory, exact or not.
// ComfyUI hands it over as the node's output "text"; without this file it is still the node's output "report".
import { app } from "../../../scripts/app.js";

const WIDGET = "cviv_report";
const PREVIEW = "$$canvas-image-preview"; // ComfyUI's widget for pictures; older front ends draw them to the node's end
const STATUS = "$$node-text-preview"; // ComfyUI's widget for what a node says while it runs
const LINE = 16; // pixels
const MOST_LINES = 14; // a longer report scrolls

function box() {
  const element = document.createElement("div");
  element.className = "cviv-report";
  element.tabIndex = 0; // so that the keyboard scrolls it
  element.setAttribute("role", "log");
  element.setAttribute("aria-label", "report");
  Object.assign(element.style, {
    boxSizing: "border-box",
    width: "100%",
    height: "100%",
    overflow: "auto",
    padding: "6px 8px",
    borderRadius: "6px",
    background: "var(--comfy-input-bg)",
    color: "var(--input-text)",
    font: `11px/${LINE}px ui-monospace, Consolas, Menlo, monospace`,
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    userSelect: "text",
    cursor: "text",
  });
  // a click or a turn of the wheel inside is for the text, not for the graph around it
  for (const name of ["pointerdown", "copy"]) element.addEventListener(name, (event) => event.stopPropagation());
  element.addEventListener("wheel", (event) => {
    if (element.scrollHeight > element.clientHeight && !event.ctrlKey) event.stopPropagation();
  });
  return element;
}

function heightFor(element, width) {
  const letters = Math.max(20, Math.floor((width - 46) / 6.7)); // of 11 px monospace in a line
  const lines = element.textContent.split("\n").map((line) => Math.max(1, Math.ceil(line.length / letters)));
  return 34 + LINE * Math.min(MOST_LINES, lines.reduce((sum, count) => sum + count, 0));
}

function show(node, text) {
  let widget = node.widgets?.find((one) => one.name === WIDGET);
  if (!widget) {
    const element = box();
    widget = node.addDOMWidget(WIDGET, "cviv_report", element, {
      serialize: false, // neither in the workflow nor in the prompt
      hideOnZoom: false,
      getValue: () => element.textContent,
      setValue: (value) => (element.textContent = value ?? ""),
      getMinHeight: () => heightFor(element, node.size[0]),
    });
    widget.serialize = false;
    const preview = node.widgets.findIndex((one) => one.name === PREVIEW);
    if (preview >= 0) node.widgets.push(...node.widgets.splice(preview, 1)); // below the report
  }
  widget.element.textContent = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  node.setDirtyCanvas?.(true, true);
}

// its last words are in the report, too
function removeStatus(node) {
  const status = node.widgets?.find((one) => one.name === STATUS);
  if (status) node.removeWidget(status);
}

function nodeAt(key) {
  const [id, graph] = String(key).split(":").reverse(); // inside a subgraph: its id, a colon, the node's id
  const root = app.rootGraph ?? app.graph;
  return (graph ? root.subgraphs?.get(graph) : root)?.getNodeById(Number(id));
}

function reportOf(output) {
  return Array.isArray(output?.text) && output.text.length ? output.text.join("\n") : null;
}

app.registerExtension({
  name: "cviv-vae.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("CVIV_")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const result = before?.call(this, output, ...rest);
      const text = reportOf(output);
      if (text !== null) {
        removeStatus(this);
        show(this, text);
      }
      return result;
    };
  },
  // nodes are built anew when another workflow was in between
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) {
      const text = reportOf(output);
      const node = text === null ? null : nodeAt(key);
      if (node?.type?.startsWith("CVIV_")) show(node, text);
    }
  },
});
