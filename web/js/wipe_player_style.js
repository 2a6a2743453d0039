// How the wipe player looks, in the colours of the page's theme, and its words.

const CSS = `
.cviv-wipe { box-sizing: border-box; width: 100%; height: 100%; display: flex; flex-direction: column;
  gap: 4px; padding: 4px; border-radius: 8px; font: 12px/1.35 Inter, system-ui, sans-serif; user-select: none;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); }
.cviv-wipe:focus-visible, .cviv-wipe :focus-visible { outline: 2px solid var(--p-primary-color, #4b9bff); outline-offset: 1px; }
.cviv-wipe-stage { position: relative; flex: 1 1 auto; min-height: 80px; overflow: hidden; border-radius: 4px;
  background: color-mix(in srgb, var(--comfy-menu-bg, #353535) 80%, #808080 20%); cursor: crosshair; touch-action: none; }
.cviv-wipe-stage.pannable { cursor: grab; }
.cviv-wipe-stage.panning { cursor: grabbing; }
.cviv-wipe-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.cviv-wipe-label { position: absolute; top: 6px; max-width: 45%; padding: 1px 7px; border-radius: 9px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; color: #fff; background: rgb(0 0 0 / 62%); pointer-events: none; }
.cviv-wipe-label.a { left: 6px; }
.cviv-wipe-label.b { right: 6px; }
.cviv-wipe-divider { position: absolute; top: 0; bottom: 0; width: 28px; margin-left: -14px; cursor: ew-resize;
  touch-action: none; }
.cviv-wipe-divider::before { content: ""; position: absolute; top: 0; bottom: 0; left: 13px; width: 2px;
  background: #fff; box-shadow: 0 0 3px rgb(0 0 0 / 80%); }
.cviv-wipe-divider::after { content: "\\2039\\2009\\203a"; position: absolute; top: 50%; left: 2px; width: 24px;
  height: 24px; margin-top: -12px; border-radius: 12px; background: #fff; color: #222; font: 700 15px/21px system-ui;
  text-align: center; box-shadow: 0 0 4px rgb(0 0 0 / 70%); }
.cviv-wipe-message { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center;
  padding: 12px; text-align: center; background: rgb(0 0 0 / 55%); color: #fff; }
.cviv-wipe [hidden] { display: none !important; }
.cviv-wipe-time { flex: none; height: 46px; border-radius: 4px; cursor: pointer; touch-action: none;
  background: color-mix(in srgb, var(--comfy-input-bg, #222) 70%, var(--comfy-menu-bg, #353535) 30%); }
.cviv-wipe-time canvas { display: block; width: 100%; height: 100%; }
.cviv-wipe-figures { flex: none; display: flex; justify-content: space-between; gap: 10px; min-height: 16px;
  padding: 0 2px; white-space: nowrap; overflow: hidden; font-variant-numeric: tabular-nums; }
.cviv-wipe-bar { flex: none; display: flex; align-items: center; gap: 3px; }
.cviv-wipe-bar .space { flex: 1; }
.cviv-wipe-bar button, .cviv-wipe-bar select { height: 26px; min-width: 28px; padding: 0 5px; border-radius: 5px;
  border: 1px solid var(--border-color, #4e4e4e); background: var(--comfy-menu-bg, #353535);
  color: var(--input-text, #ddd); font: inherit; cursor: pointer; display: inline-flex; align-items: center;
  justify-content: center; }
.cviv-wipe-bar button:hover { filter: brightness(1.15); }
.cviv-wipe-bar button[aria-pressed="true"] { background: var(--p-primary-color, #2f7fe0);
  color: var(--p-primary-contrast-color, #fff); border-color: transparent; }
.cviv-wipe-bar svg { width: 15px; height: 15px; fill: currentcolor; }
.cviv-wipe:fullscreen { padding: 10px; border-radius: 0; }
.cviv-wipe:fullscreen .cviv-wipe-stage { aspect-ratio: auto !important; flex: 1 1 0; }
`;

const PATHS = {
  play: "M4 2l10 6-10 6z",
  pause: "M3 2h4v12H3zM9 2h4v12H9z",
  back: "M11 2v12L4 8zM2 2h2v12H2z",
  forward: "M5 2v12l7-6zM12 2h2v12h-2z",
  loop: "M3 8a4 4 0 0 1 4-4h3V1l4 4-4 4V6H7a2 2 0 0 0-2 2H3zm10 0a4 4 0 0 1-4 4H6v3l-4-4 4-4v3h3a2 2 0 0 0 2-2h2z",
  less: "M3 7h10v2H3z",
  more: "M7 3h2v4h4v2H9v4H7V9H3V7h4z",
  full: "M2 2h5v2H4v3H2zM9 2h5v5h-2V4H9zM2 9h2v3h3v2H2zM12 9h2v5H9v-2h3z",
};

export const WORDS = {
  en: {
    player: "Two clips, one over the other. Space: play; arrows: single steps; plus, minus, 0: zoom; d: difference; l: loop.",
    play: "Play (Space)",
    pause: "Pause (Space)",
    back: "One frame back (Left)",
    forward: "One frame on (Right)",
    loop: "Repeat (L)",
    difference: "Difference (D)",
    shortDifference: "Diff",
    gain: "Gain of the difference",
    less: "Zoom out (-)",
    more: "Zoom in (+)",
    fit: "Fit (0)",
    full: "Full screen (F)",
    divider: "Divider: what is left of it shows {0}, what is right of it {1}",
    frame: "Frame",
    frameOf: "frame {0} of {1}",
    equal: "equal",
    under: "here, {0} x {1} px: {2}",
    loading: "Loading",
    gone: "The pictures are no longer there. Run the node again.",
  },
  zh: {
    player: "两段视频叠放对比。空格：播放；方向键：逐帧；加、减、0：缩放；d：差异；l：循环。",
    play: "播放（空格）",
    pause: "暂停（空格）",
    back: "后退一帧（←）",
    forward: "前进一帧（→）",
    loop: "循环（L）",
    difference: "差异（D）",
    shortDifference: "差异",
    gain: "差异的放大倍数",
    less: "缩小（-）",
    more: "放大（+）",
    fit: "适应（0）",
    full: "全屏（F）",
    divider: "分隔线：左边是 {0}，右边是 {1}",
    frame: "帧",
    frameOf: "第 {0} 帧，末帧 {1}",
    equal: "相同",
    under: "光标处 {0} x {1} 像素：{2}",
    loading: "正在加载",
    gone: "图片已不存在。请重新运行该节点。",
  },
};

/** An icon as SVG element. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** Put the style sheet into the page, once. */
export function addStyle() {
  if (document.getElementById("cviv-wipe-style")) return;
  const style = document.createElement("style");
  style.id = "cviv-wipe-style";
  style.textContent = CSS;
  document.head.append(style);
}

/** A value of the node in words; null stands for none, "inf" for frames that are equal. */
export function figure(value, words) {
  if (value === null || value === undefined) return "-";
  return value === "inf" ? words.equal : value.toFixed(Math.abs(value) < 2 ? 4 : 2);
}

/** "PSNR (dB)" and 30 as "PSNR 30.00 dB". */
export function withUnit(name, value, words) {
  const [, what, unit] = name.match(/^(.*?)(?: \((.*)\))?$/);
  return `${what} ${figure(value, words)}${unit && typeof value === "number" ? ` ${unit}` : ""}`;
}

/** `text` with {0}, {1} ... replaced. */
export function fill(text, ...values) {
  return text.replace(/\{(\d)\}/g, (_, index) => values[Number(index)]);
}

/** How much larger than laid out an element is shown: the graph is zoomed by a CSS transform. */
export function scaleOf(element) {
  return element.getBoundingClientRect().width / element.clientWidth || 1;
}
