// The strip below the picture: a value for every frame as a curve, and the frame that is shown.
import { figure, fill, scaleOf } from "./wipe_player_style.js";

const EDGE = 6; // pixels left free at each side

export class Timeline {
  /** `seek` is called with the frame that the user points at. */
  constructor(words, seek) {
    Object.assign(this, { words, seek, frame: 0, hover: null, told: null });
    this.element = document.createElement("div");
    this.element.className = "cviv-wipe-time";
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "slider");
    this.element.setAttribute("aria-label", words.frame);
    this.element.setAttribute("aria-valuemin", 0);
    this.canvas = document.createElement("canvas");
    this.element.append(this.canvas);
    this.element.addEventListener("pointerdown", (event) => this.begin(event));
    this.element.addEventListener("pointermove", (event) => this.hoverAt(this.frameAt(event)));
    this.element.addEventListener("pointerleave", () => this.hoverAt(null));
  }

  show(told) {
    this.told = told;
    this.element.setAttribute("aria-valuemax", told.frames - 1);
  }

  /** Show `frame` as the one in the picture. */
  mark(frame) {
    this.frame = frame;
    const values = this.told.numbers[0]?.values;
    const said = fill(this.words.frameOf, frame, this.told.frames - 1);
    this.element.setAttribute("aria-valuenow", frame);
    this.element.setAttribute("aria-valuetext", values ? `${said}, ${figure(values[frame], this.words)}` : said);
    this.draw();
  }

  begin(event) {
    if (event.button !== 0 || !this.told) return;
    this.element.setPointerCapture(event.pointerId);
    const follow = (next) => this.seek(this.frameAt(next));
    follow(event);
    this.element.addEventListener("pointermove", follow);
    const end = () => this.element.removeEventListener("pointermove", follow);
    for (const name of ["pointerup", "pointercancel"]) this.element.addEventListener(name, end, { once: true });
  }

  frameAt(event) {
    if (!this.told) return null;
    const box = this.element.getBoundingClientRect();
    const x = (event.clientX - box.left) / scaleOf(this.element);
    const part = (x - EDGE) / Math.max(1, this.element.clientWidth - 2 * EDGE);
    return Math.round(Math.min(1, Math.max(0, part)) * (this.told.frames - 1));
  }

  hoverAt(frame) {
    if (frame === this.hover) return;
    this.hover = frame;
    if (this.told) this.draw();
  }

  draw() {
    const [width, height] = [this.element.clientWidth, this.element.clientHeight];
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this.element);
    const ink = style.color;
    const accent = style.getPropertyValue("--p-primary-color").trim() || "#4b9bff";
    const across = (frame) => EDGE + ((width - 2 * EDGE) * frame) / Math.max(1, this.told.frames - 1);
    this.drawCurve(pen, height, across, ink);
    this.drawLine(pen, across(this.frame), height, accent, 2);
    if (this.hover !== null) this.drawHover(pen, across(this.hover), width, height, ink);
  }

  drawLine(pen, x, height, colour, width) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x, 0);
    pen.lineTo(x, height);
    pen.stroke();
  }

  drawCurve(pen, height, across, ink) {
    const { name, values } = this.told.numbers[0] ?? { name: "", values: [] };
    const finite = values.filter((value) => typeof value === "number");
    const low = finite.reduce((least, value) => Math.min(least, value), Infinity);
    const high = finite.reduce((most, value) => Math.max(most, value), -Infinity);
    const down = (value) => {
      if (value === "inf") return 4;
      return high > low ? height - 6 - ((height - 22) * (value - low)) / (high - low) : (height + 10) / 2;
    };
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = 1.5;
    pen.beginPath();
    let drawn = false;
    values.forEach((value, frame) => {
      if (value !== null) drawn ? pen.lineTo(across(frame), down(value)) : pen.moveTo(across(frame), down(value));
      drawn = value !== null;
    });
    pen.stroke();
    if (finite.length && this.hover === null) {
      pen.globalAlpha = 0.75;
      pen.font = "10px system-ui, sans-serif";
      pen.fillText(`${name}: ${figure(low, this.words)} – ${figure(high, this.words)}`, EDGE + 6, 11);
      pen.globalAlpha = 1;
    }
  }

  drawHover(pen, x, width, height, ink) {
    pen.globalAlpha = 0.5;
    this.drawLine(pen, x, height, ink, 1);
    pen.globalAlpha = 1;
    const values = this.told.numbers[0]?.values;
    const text = `${this.hover}${values ? `: ${figure(values[this.hover], this.words)}` : ""}`;
    pen.font = "10px system-ui, sans-serif";
    pen.fillStyle = ink;
    const length = pen.measureText(text).width;
    pen.fillText(text, x + 4 + length > width ? x - 4 - length : x + 4, 11);
  }
}
