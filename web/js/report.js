// The report of our nodes, kept on the node: one line, and on a click all the rest.
// ComfyUI hands it over as the node's output "text"; without this file it is still the node's output "report".
import { onOutput } from "./node_outputs.js";

const WIDGET = "cviv_report";
const PREVIEW = "$$canvas-image-preview"; // ComfyUI's widget for pictures; older front ends draw them to the node's end
const LINE = 16; // pixels
const CHROME = 10; // pixels of height that are not text
const MARGIN = 4; // pixels around it
const MOST_LINES = 16; // a longer report scrolls
const FONT = "11px ui-sans-serif, system-ui, sans-serif";
const EDGES = 60; // pixels of a node's width that the text does not get, at most

const STYLE = `
.cviv-report { box-sizing: border-box; width: 100%; overflow: hidden; border-radius: 6px; background: var(--comfy-input-bg);
  color: var(--input-text); font: 11px/${LINE}px ui-sans-serif, system-ui, sans-serif; }
.cviv-report-head { display: flex; gap: 5px; box-sizing: border-box; width: 100%; padding: 5px 8px; border: 0; background: none;
  color: inherit; font: inherit; text-align: start; cursor: pointer; user-select: text; }
.cviv-report-head:disabled { cursor: text; }
.cviv-report-head:focus-visible { outline: 2px solid var(--p-primary-color, #60a5fa); outline-offset: -2px; border-radius: 6px; }
.cviv-report-mark { flex: none; width: 8px; transition: transform 0.1s; }
.cviv-report-head:disabled .cviv-report-mark { display: none; }
.cviv-report-head[aria-expanded="true"] .cviv-report-mark { transform: rotate(90deg); }
.cviv-report-line { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cviv-report-head[aria-expanded="true"] .cviv-report-line { white-space: normal; overflow-wrap: anywhere; }
.cviv-report-details { box-sizing: border-box; max-height: ${LINE * MOST_LINES}px; margin: 0; padding: 0 8px 5px 21px; overflow: auto;
  font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; cursor: text; opacity: 0.85; }
`;

function addStyle() {
  if (document.getElementById("cviv-report-style")) return;
  const style = document.createElement("style");
  style.id = "cviv-report-style";
  style.textContent = STYLE;
  document.head.append(style);
}

let pen; // only measures

/** How many lines a paragraph takes in `room` pixels, broken between words as the browser does it. */
function linesOf(text, room) {
  pen ??= document.createElement("canvas").getContext("2d");
  pen.font = FONT;
  const space = pen.measureText(" ").width;
  let [lines, used] = [1, 0];
  for (const word of text.split(" ")) {
    const width = pen.measureText(word).width;
    if (used && used + space + width > room) [lines, used] = [lines + 1, 0];
    used += (used ? space : 0) + width;
    if (used > room) [lines, used] = [lines + Math.ceil(used / room) - 1, used % room]; // a long word is broken
  }
  return lines;
}

class Report {
  constructor(changed) {
    addStyle();
    const make = (tag, name) => Object.assign(document.createElement(tag), { className: name });
    this.element = make("div", "cviv-report");
    this.element.setAttribute("role", "log");
    this.element.setAttribute("aria-label", "report");
    this.head = Object.assign(make("button", "cviv-report-head"), { type: "button" });
    this.line = make("span", "cviv-report-line");
    this.head.append(Object.assign(make("span", "cviv-report-mark"), { textContent: "▸" }), this.line);
    this.details = make("pre", "cviv-report-details");
    this.details.tabIndex = 0; // so that the keyboard scrolls it
    this.element.append(this.head, this.details);
    this.text = "";
    this.fold(true);
    // what the browser makes of it may be a line more than was reckoned
    new ResizeObserver(() => {
      const needed = this.head.offsetHeight + this.details.offsetHeight;
      if (this.folded || !this.details.offsetHeight) return;
      const by = needed - this.height();
      this.needed = needed;
      if (by > 0) changed(by);
    }).observe(this.details);
    this.head.addEventListener("click", () => {
      const before = this.height();
      this.fold(!this.folded);
      changed(this.height() - before);
    });
    // a click or a turn of the wheel inside is for the text, not for the graph around it
    for (const name of ["pointerdown", "copy"]) this.element.addEventListener(name, (event) => event.stopPropagation());
    this.details.addEventListener("wheel", (event) => {
      if (this.details.scrollHeight > this.details.clientHeight && !event.ctrlKey) event.stopPropagation();
    });
  }

  show(text) {
    this.text = text;
    this.needed = 0;
    const [line, ...rest] = text.split("\n");
    this.line.textContent = this.head.title = line;
    this.details.textContent = rest.join("\n");
    this.head.disabled = rest.length === 0;
    if (rest.length === 0) this.fold(true);
  }

  fold(on) {
    this.folded = on;
    this.needed = 0;
    this.head.setAttribute("aria-expanded", String(!on));
    this.details.hidden = on;
  }

  /** Pixels that it takes in a node of the width that it was last drawn at. */
  height() {
    if (this.folded) return LINE + CHROME;
    const room = Math.max(100, (this.width ?? 300) - EDGES);
    const lines = (text) => text.split("\n").reduce((sum, line) => sum + linesOf(line, room), 0);
    const reckoned = LINE * lines(this.line.textContent) + CHROME + 5 + LINE * Math.min(MOST_LINES, lines(this.details.textContent));
    return Math.max(reckoned, this.needed);
  }
}

const reports = new WeakMap(); // node -> Report

/** Make the node as high as it must be; it keeps what its user made it higher than that. */
function grow(node, by) {
  const least = node.computeSize();
  const height = Math.max(least[1], node.size[1] + by);
  node.setSize([Math.max(least[0], node.size[0]), height]);
  node.setDirtyCanvas?.(true, true);
}

function addReport(node) {
  const report = new Report((by) => grow(node, by));
  reports.set(node, report);
  const height = () => {
    report.width = node.size[0];
    return report.height() + 2 * MARGIN;
  };
  const widget = node.addDOMWidget(WIDGET, "cviv_report", report.element, {
    serialize: false, // neither in the workflow nor in the prompt
    hideOnZoom: false,
    getValue: () => report.text,
    setValue: (value) => report.show(value ?? ""),
    getMinHeight: height,
    getMaxHeight: height,
    margin: MARGIN,
  });
  widget.serialize = false;
  const preview = node.widgets.findIndex((one) => one.name === PREVIEW);
  if (preview >= 0) node.widgets.push(...node.widgets.splice(preview, 1)); // below the report
  return report;
}

onOutput((node, output) => {
  if (!Array.isArray(output.text) || !output.text.length) return;
  const known = reports.get(node);
  const report = known ?? addReport(node);
  if (!known && output.cviv_unfolded) report.fold(false);
  report.show(output.text.join("\n"));
  grow(node, 0);
});
