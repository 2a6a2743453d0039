// What mouse, touch, wheel and keyboard do to a wipe player.
import { scaleOf } from "./wipe_player_style.js";

export class Input {
  constructor(player) {
    this.player = player;
    this.listen();
  }

  listen() {
    const { element, stage, handle } = this.player;
    // what happens here is for the player, not for the graph around it; the middle button moves the graph
    for (const name of ["pointerdown", "mousedown", "dblclick"]) {
      element.addEventListener(name, (event) => event.button !== 1 && event.stopPropagation());
    }
    element.addEventListener("keydown", (event) => this.onKey(event));
    handle.addEventListener("pointerdown", (event) => this.drag(event, (at) => this.dividerTo(at[0])));
    stage.addEventListener("pointerdown", (event) => this.onStage(event));
    stage.addEventListener("pointermove", (event) => {
      this.player.cursor = this.player.dragging ? null : this.within(this.at(event));
      this.player.draw();
    });
    stage.addEventListener("pointerleave", () => {
      this.player.cursor = null;
      this.player.draw();
    });
    stage.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
  }

  /** Where an event is on the stage, in its pixels. */
  at(event) {
    const box = this.player.stage.getBoundingClientRect();
    const scale = scaleOf(this.player.stage);
    return [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
  }

  /** A place moved onto the stage: browsers round where the pointer is, at its edge to a place outside. */
  within(at) {
    const { clientWidth, clientHeight } = this.player.stage;
    return [Math.min(Math.max(at[0], 0), clientWidth - 0.5), Math.min(Math.max(at[1], 0), clientHeight - 0.5)];
  }

  /** Follow the pointer until it is let go. */
  drag(event, moved) {
    if (event.button !== 0) return;
    const target = event.currentTarget;
    target.setPointerCapture(event.pointerId);
    Object.assign(this.player, { dragging: true, cursor: null });
    const move = (next) => moved(this.at(next));
    const end = () => {
      target.removeEventListener("pointermove", move);
      this.player.dragging = false;
      this.player.stage.classList.remove("panning");
    };
    target.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) target.addEventListener(name, end, { once: true });
  }

  dividerTo(x) {
    if (!this.player.told) return;
    const { box } = this.player.place();
    this.player.setDivider((x - box[0]) / box[1]);
  }

  /** Not on the divider: zoomed in, the picture is moved; else the divider comes to the pointer. */
  onStage(event) {
    if (event.button !== 0 || !this.player.told || this.player.handle.contains(event.target)) return;
    this.player.element.focus({ preventScroll: true });
    if (this.player.zoom === 1) {
      this.dividerTo(this.at(event)[0]);
      return this.drag(event, (at) => this.dividerTo(at[0]));
    }
    const [start, pan] = [this.at(event), [...this.player.pan]];
    this.player.stage.classList.add("panning");
    this.drag(event, (at) => {
      this.player.pan = pan.map((shift, axis) => shift + at[axis] - start[axis]);
      this.player.draw();
    });
  }

  /** The wheel zooms the picture. */
  onWheel(event) {
    if (!this.player.told) return;
    event.preventDefault();
    event.stopPropagation();
    this.player.zoomBy(1.0018 ** -event.deltaY, this.at(event));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const onDivider = event.target === this.player.handle;
    const along = (by) => (onDivider ? this.player.setDivider(this.player.divider + 0.02 * by) : this.player.step(by));
    const acts = {
      ArrowLeft: () => along(-1),
      ArrowRight: () => along(1),
      Home: () => (onDivider ? this.player.setDivider(0) : this.player.seekFrame(0)),
      End: () => (onDivider ? this.player.setDivider(1) : this.player.seekFrame(this.player.told.frames - 1)),
      "+": () => this.player.zoomBy(1.5),
      "=": () => this.player.zoomBy(1.5),
      "-": () => this.player.zoomBy(1 / 1.5),
      0: () => this.player.fit(),
      d: () => this.player.setDifference(!this.player.differing),
      l: () => this.player.setLoop(!this.player.loop),
      f: () => this.player.fullScreen(),
      " ": () => this.player.play(!this.player.playing),
    };
    const act = acts[event.key] ?? acts[event.key.toLowerCase()];
    if (!act || !this.player.told || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }
}
