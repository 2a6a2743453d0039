// The wipe player: two clips one over the other, a divider, single steps, zoom, a difference view, figures per frame.
import { Frames, Pixels } from "./wipe_player_frames.js";
import { Input } from "./wipe_player_input.js";
import { addStyle, fill, icon, scaleOf, withUnit, WORDS } from "./wipe_player_style.js";
import { Timeline } from "./wipe_player_timeline.js";

const GAINS = [1, 2, 4, 8, 16, 32];
const MOST_ZOOM = 32;
const WINDOW = 33; // side in pixels of what the figure under the cursor is of
const CHROME = 116; // pixels of height that all but the picture takes
const NODE_EDGE = 30; // pixels of a node's width that a widget does not get

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function make(tag, className, attributes = {}) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Its state, and how that is drawn; what the user does to it is in wipe_player_input.js. */
export class WipePlayer {
  constructor(language) {
    addStyle();
    this.words = WORDS[String(language).slice(0, 2)] ?? WORDS.en;
    Object.assign(this, { index: 0, playing: false, loop: true, differing: false, gain: 4, divider: 0.5 });
    Object.assign(this, { zoom: 1, pan: [0, 0], cursor: null, dragging: false, told: null, frames: null, pixels: null, drawing: 0 });
    this.build();
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.stage);
    this.themed = new MutationObserver(() => this.draw()); // the curve has the colours of the theme
    this.themed.observe(document.documentElement, { attributeFilter: ["style", "class"] });
    this.themed.observe(document.body, { attributeFilter: ["style", "class"] });
  }

  // -------------------------------------------------------------------------------------------------------- elements

  build() {
    const root = make("div", "cviv-wipe", { tabindex: 0, role: "group", "aria-label": this.words.player });
    root.dataset.captureWheel = "true"; // in Nodes 2.0 the wheel is the graph's, but over what has the focus
    this.stage = make("div", "cviv-wipe-stage");
    this.canvas = make("canvas", "", { role: "img" });
    this.labels = ["a", "b"].map((side) => make("span", `cviv-wipe-label ${side}`));
    this.handle = make("div", "cviv-wipe-divider", {
      tabindex: 0, role: "slider", "aria-orientation": "horizontal", "aria-valuemin": 0, "aria-valuemax": 100,
    }); // prettier-ignore
    this.message = make("div", "cviv-wipe-message", { role: "status" });
    this.stage.append(this.canvas, ...this.labels, this.handle, this.message);
    this.figures = make("div", "cviv-wipe-figures");
    this.frameText = make("span", "frame");
    this.cursorText = make("span", "cursor");
    this.figures.append(this.frameText, this.cursorText);
    this.timeline = new Timeline(this.words, (frame) => this.seekFrame(frame));
    root.append(this.stage, this.timeline.element, this.figures, this.bar());
    this.element = root;
    new Input(this);
  }

  bar() {
    const bar = make("div", "cviv-wipe-bar", { role: "toolbar" });
    const button = (name, act, pressed) => {
      const one = make("button", name, { type: "button", title: this.words[name], "aria-label": this.words[name] });
      if (pressed !== undefined) one.setAttribute("aria-pressed", pressed);
      one.addEventListener("click", act);
      bar.append(one);
      return one;
    };
    button("back", () => this.step(-1)).append(icon("back"));
    this.playButton = button("play", () => this.play(!this.playing));
    button("forward", () => this.step(1)).append(icon("forward"));
    this.loopButton = button("loop", () => this.setLoop(!this.loop), this.loop);
    this.loopButton.append(icon("loop"));
    bar.append(make("span", "space"));
    this.differenceButton = button("difference", () => this.setDifference(!this.differing), this.differing);
    this.differenceButton.textContent = this.words.shortDifference;
    this.gainChoice = make("select", "gain", { title: this.words.gain, "aria-label": this.words.gain });
    for (const gain of GAINS) this.gainChoice.append(new Option(`x${gain}`, gain, false, gain === this.gain));
    this.gainChoice.addEventListener("change", () => {
      this.gain = Number(this.gainChoice.value);
      this.setDifference(true);
    });
    bar.append(this.gainChoice, make("span", "space"));
    button("less", () => this.zoomBy(1 / 1.5)).append(icon("less"));
    this.fitButton = button("fit", () => this.fit());
    button("more", () => this.zoomBy(1.5)).append(icon("more"));
    button("full", () => this.fullScreen()).append(icon("full"));
    this.showPlaying();
    return bar;
  }

  /** Height in pixels that suits a node of this width. */
  heightAt(width) {
    const shape = this.told ? this.told.height / this.told.width : 9 / 16;
    return Math.round(clamp((width - NODE_EDGE) * shape, 120, 900)) + CHROME;
  }

  // ----------------------------------------------------------------------------------------------------------- clips

  /** Show what the node told; false where it is shown already. */
  show(told, address) {
    if (this.told?.files.subfolder === told.files.subfolder) return false;
    this.frames?.close();
    this.told = told;
    this.pixels = null;
    this.index = clamp(this.index, 0, told.count - 1);
    this.say(this.words.loading);
    const arrived = (index) => index === this.index && this.draw();
    const failed = () => {
      this.play(false);
      this.say(this.words.gone);
    };
    this.frames = new Frames(told, address, arrived, failed);
    this.timeline.show(told);
    this.stage.style.aspectRatio = `${told.width} / ${told.height}`;
    this.labels.forEach((label, side) => (label.textContent = label.title = told.labels[side]));
    this.handle.setAttribute("aria-label", fill(this.words.divider, ...told.labels));
    this.changed();
    return true;
  }

  /** Stop, and let go of all pictures. */
  destroy() {
    this.playing = false;
    cancelAnimationFrame(this.drawing);
    cancelAnimationFrame(this.ticking);
    this.resized.disconnect();
    this.themed.disconnect();
    this.frames?.close();
    Object.assign(this, { frames: null, pixels: null, told: null, destroyed: true });
    this.canvas.width = this.canvas.height = 0;
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  // ------------------------------------------------------------------------------------------------------------ time

  seek(index) {
    if (!this.told) return;
    this.index = clamp(index, 0, this.told.count - 1);
    this.started = null;
    this.draw();
  }

  /** Go to the frame of the clip, of which every `stride`-th is here. */
  seekFrame(frame) {
    this.play(false);
    this.seek(Math.round(frame / this.told.stride));
  }

  step(by) {
    if (!this.told) return;
    this.play(false);
    const count = this.told.count;
    this.seek(this.loop ? (this.index + by + count) % count : this.index + by);
  }

  play(on) {
    if (!this.told || on === this.playing) return;
    this.playing = on;
    if (on && this.index === this.told.count - 1) this.index = 0;
    this.started = null;
    this.showPlaying();
    if (on) this.ticking = requestAnimationFrame((now) => this.tick(now));
  }

  tick(now) {
    if (!this.playing) return;
    this.ticking = requestAnimationFrame((later) => this.tick(later));
    if (!this.frames.at(this.index)) return void (this.started = null); // the clock waits for the picture
    this.frames.prepare(this.index, this.loop);
    this.started ??= now - (this.index * 1000 * this.told.stride) / this.told.fps;
    const due = Math.floor(((now - this.started) * this.told.fps) / (1000 * this.told.stride));
    if (due <= this.index) return;
    if (due < this.told.count) this.index = due;
    else if (!this.loop) this.end();
    else Object.assign(this, { index: 0, started: null });
    this.draw();
  }

  /** Stop at the last frame, also where the page was too slow to show those before it. */
  end() {
    this.play(false);
    this.index = this.told.count - 1;
  }

  showPlaying() {
    const name = this.playing ? "pause" : "play";
    this.playButton.replaceChildren(icon(name));
    this.playButton.title = this.words[name];
    this.playButton.setAttribute("aria-label", this.words[name]);
  }

  // --------------------------------------------------------------------------------------------------------- choices

  setLoop(on) {
    this.loop = on;
    this.loopButton.setAttribute("aria-pressed", on);
  }

  setDifference(on) {
    this.differing = on;
    this.differenceButton.setAttribute("aria-pressed", on);
    this.changed();
  }

  setDivider(part) {
    this.divider = clamp(part, 0, 1);
    this.changed();
  }

  fit() {
    Object.assign(this, { zoom: 1, pan: [0, 0] });
    this.changed();
  }

  /** Zoom about a point of the stage, in pixels of the stage; its middle where none is given. */
  zoomBy(factor, at = [this.stage.clientWidth / 2, this.stage.clientHeight / 2]) {
    const zoom = clamp(this.zoom * factor, 1, MOST_ZOOM);
    const middle = [this.stage.clientWidth / 2, this.stage.clientHeight / 2];
    const by = zoom / this.zoom;
    this.pan = this.pan.map((shift, axis) => (at[axis] - middle[axis]) * (1 - by) + shift * by);
    this.zoom = zoom;
    this.changed();
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.element.requestFullscreen?.();
  }

  // --------------------------------------------------------------------------------------------------------- drawing

  /** Where the picture lies on the stage, in pixels of the stage: left, top, and stage pixels for one of its own. */
  place() {
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    const whole = Math.min(width / this.told.width, height / this.told.height);
    const scale = whole * this.zoom;
    const room = [width, height].map((side, axis) => {
      const picture = [this.told.width, this.told.height][axis] * scale;
      this.pan[axis] = clamp(this.pan[axis], -Math.max(0, picture - side) / 2, Math.max(0, picture - side) / 2);
      return (side - picture) / 2 + this.pan[axis];
    });
    const left = (width - this.told.width * whole) / 2;
    return { left: room[0], top: room[1], scale, box: [left, this.told.width * whole] };
  }

  draw() {
    if (this.drawing || this.destroyed) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      if (this.told && this.stage.clientWidth) this.paint();
    });
  }

  paint() {
    const pair = this.frames.at(this.index);
    if (!pair) return; // it is drawn when it arrives
    this.say("");
    this.frames.prepare(this.index, this.loop);
    const { left, top, scale, box } = this.place();
    const ratio = (window.devicePixelRatio || 1) * clamp(scaleOf(this.stage), 1, 2);
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.imageSmoothingEnabled = scale * ratio < 3; // beyond, single pixels are what one wants to see
    const size = [this.told.width * scale, this.told.height * scale];
    const split = box[0] + this.divider * box[1];
    if (this.differing) {
      pen.drawImage(this.differenceCanvas(), left, top, ...size);
    } else {
      this.drawPart(pen, pair[0], [left, top, ...size], [0, split]);
      this.drawPart(pen, pair[1], [left, top, ...size], [split, width]);
    }
    this.drawWindow(pen, left, top, scale);
    this.handle.style.left = `${split}px`;
    this.showState();
  }

  drawPart(pen, picture, place, [from, to]) {
    pen.save();
    pen.beginPath();
    pen.rect(from, 0, to - from, this.stage.clientHeight);
    pen.clip();
    pen.drawImage(picture, ...place);
    pen.restore();
  }

  /** The frame around the pixels that the figure under the cursor is of. */
  drawWindow(pen, left, top, scale) {
    const here = this.windowAt(left, top, scale);
    if (!here) return void (this.cursorText.textContent = "");
    const [x0, y0, x1, y1] = here;
    const rectangle = [left + x0 * scale, top + y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale];
    pen.lineWidth = 1;
    for (const [colour, grow] of [["#000", 0.5], ["#fff", -0.5]]) {
      pen.strokeStyle = colour;
      pen.strokeRect(rectangle[0] - grow, rectangle[1] - grow, rectangle[2] + 2 * grow, rectangle[3] + 2 * grow);
    }
    const psnr = this.pixelsNow().psnr(...here);
    const told = Number.isFinite(psnr) ? `${psnr.toFixed(2)} dB` : this.words.equal;
    this.cursorText.textContent = fill(this.words.under, x1 - x0, y1 - y0, told);
  }

  windowAt(left, top, scale) {
    if (!this.cursor || this.playing) return null;
    const [x, y] = [Math.floor((this.cursor[0] - left) / scale), Math.floor((this.cursor[1] - top) / scale)];
    if (x < 0 || y < 0 || x >= this.told.width || y >= this.told.height) return null;
    const half = (WINDOW - 1) / 2;
    return [
      Math.max(0, x - half), Math.max(0, y - half),
      Math.min(this.told.width, x + half + 1), Math.min(this.told.height, y + half + 1),
    ]; // prettier-ignore
  }

  pixelsNow() {
    if (this.pixels?.index !== this.index) {
      this.pixels = new Pixels(this.frames.at(this.index), this.told.width, this.told.height);
      this.pixels.index = this.index;
    }
    return this.pixels;
  }

  differenceCanvas() {
    const pixels = this.pixelsNow();
    if (pixels.gain !== this.gain) Object.assign(pixels, { gain: this.gain, picture: pixels.difference(this.gain) });
    return pixels.picture;
  }

  showState() {
    const frame = this.index * this.told.stride;
    const figures = this.told.numbers.map((one) => withUnit(one.name, one.values[frame], this.words));
    const text = [fill(this.words.frameOf, frame, this.told.frames - 1), ...figures].join(" · ");
    this.frameText.textContent = text;
    this.canvas.setAttribute("aria-label", text);
    this.timeline.mark(frame);
  }

  /** A choice of the user has changed: say so at once, draw with the page's next frame. */
  changed() {
    this.handle.hidden = this.labels[0].hidden = this.labels[1].hidden = this.differing;
    this.handle.setAttribute("aria-valuenow", Math.round(this.divider * 100));
    this.stage.classList.toggle("pannable", this.zoom > 1);
    this.fitButton.textContent = `${Math.round(this.zoom * 100)}%`;
    this.draw();
  }
}
