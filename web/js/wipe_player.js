// A player for two clips on every node of this pack whose output has the key "cviv_wipe" (nodes/compare/wipe.py).
// Without this file the node still has its chart, table and report.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { onOutput } from "./node_outputs.js";
import { WipePlayer } from "./wipe_player_view.js";

const KEY = "cviv_wipe";
const WIDTH = 520; // pixels that a node gets at least when the player comes onto it

const players = new WeakMap(); // node -> WipePlayer

function addressOf(files) {
  return (name) => api.apiURL("/view?" + new URLSearchParams({ filename: name, ...files }));
}

function addPlayer(node) {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  const player = new WipePlayer(language);
  players.set(node, player);
  const widget = node.addDOMWidget(KEY, KEY, player.element, {
    serialize: false, // neither in the workflow nor in the prompt
    hideOnZoom: false,
    getValue: () => undefined,
    setValue: () => {},
    getMinHeight: () => player.heightAt(node.size[0]),
  });
  widget.serialize = false;
  putFirst(node, widget);
  const removed = node.onRemoved;
  node.onRemoved = function (...rest) {
    player.destroy();
    players.delete(node);
    return removed?.apply(this, rest);
  };
  return player;
}

// above the report, where that came first
function putFirst(node, widget) {
  const report = node.widgets.findIndex((one) => one.name === "cviv_report");
  if (report < 0) return;
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.widgets.splice(report, 0, widget);
}

function show(node, told) {
  const fresh = !players.has(node);
  const player = players.get(node) ?? addPlayer(node);
  if (!player.show(told, addressOf(told.files)) && !fresh) return; // the same clips: it stays where it is
  node.setSize([Math.max(WIDTH, node.size[0]), node.size[1]]);
  node.setSize([node.size[0], Math.max(node.computeSize()[1], node.size[1])]);
  node.setDirtyCanvas?.(true, true);
}

onOutput((node, output) => {
  if (output[KEY]?.[0]) show(node, output[KEY][0]);
});
