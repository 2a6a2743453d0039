// The pictures of two clips: fetched when they are needed, kept within a bound, and compared pixel by pixel.

const MOST_BYTES = 384 * 1024 * 1024; // of decoded pictures that one player keeps
const AHEAD = 12; // frames that are fetched before they are needed

/** Pairs of pictures by index. `address` turns a file name into a URL; `arrived` is called with the index of each. */
export class Frames {
  constructor(told, address, arrived, failed) {
    Object.assign(this, { count: told.count, width: told.width, height: told.height, address, arrived, failed });
    this.pairs = new Map(); // index -> [ImageBitmap, ImageBitmap], the least recently used first
    this.under_way = new Set();
    this.abort = new AbortController();
    this.most = Math.max(AHEAD + 2, Math.floor(MOST_BYTES / (8 * told.width * told.height)));
  }

  /** The pair of a frame, or undefined while it is on its way. */
  at(index) {
    const pair = this.pairs.get(index);
    if (!pair) return void this.fetch(index);
    this.pairs.delete(index);
    this.pairs.set(index, pair);
    return pair;
  }

  /** Fetch what comes after `index`; round the end where `loop` is true. */
  prepare(index, loop) {
    for (let next = index + 1; next <= index + AHEAD; next++) {
      if (next < this.count || loop) this.fetch(next % this.count);
    }
  }

  async fetch(index) {
    if (this.pairs.has(index) || this.under_way.has(index)) return;
    this.under_way.add(index);
    try {
      const pair = await Promise.all(["a", "b"].map((side) => this.picture(side, index)));
      if (this.abort.signal.aborted) return pair.forEach((one) => one.close());
      this.pairs.set(index, pair);
      for (const [oldest, old] of this.pairs) {
        if (this.pairs.size <= this.most) break;
        old.forEach((one) => one.close());
        this.pairs.delete(oldest);
      }
      this.arrived(index);
    } catch (error) {
      if (!this.abort.signal.aborted) this.failed(error);
    } finally {
      this.under_way.delete(index);
    }
  }

  async picture(side, index) {
    const url = this.address(`${side}_${String(index).padStart(5, "0")}.webp`);
    const answer = await fetch(url, { signal: this.abort.signal, cache: "force-cache" });
    if (!answer.ok) throw new Error(`${answer.status} ${url}`);
    return createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  }

  /** Let go of everything. */
  close() {
    this.abort.abort();
    for (const pair of this.pairs.values()) pair.forEach((one) => one.close());
    this.pairs.clear();
  }
}

/** The pixels of one pair, for the figures under the cursor and the difference view. */
export class Pixels {
  constructor(pair, width, height) {
    Object.assign(this, { width, height });
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    [this.a, this.b] = pair.map((picture) => {
      pen.drawImage(picture, 0, 0);
      return pen.getImageData(0, 0, width, height).data;
    });
  }

  /** PSNR in dB of the pixels from (left, top) up to (right, bottom); Infinity where they are equal. */
  psnr(left, top, right, bottom) {
    let sum = 0;
    for (let y = top; y < bottom; y++) {
      for (let i = 4 * (y * this.width + left), end = 4 * (y * this.width + right); i < end; i += 4) {
        for (let c = 0; c < 3; c++) sum += (this.a[i + c] - this.b[i + c]) ** 2;
      }
    }
    return 10 * Math.log10((255 * 255 * 3 * (right - left) * (bottom - top)) / sum);
  }

  /** A canvas with |a - b| times `gain`. */
  difference(gain) {
    const canvas = document.createElement("canvas");
    canvas.width = this.width;
    canvas.height = this.height;
    const pen = canvas.getContext("2d");
    const image = pen.createImageData(this.width, this.height);
    for (let i = 0; i < image.data.length; i++) {
      image.data[i] = i % 4 === 3 ? 255 : gain * Math.abs(this.a[i] - this.b[i]); // clamped by its type
    }
    pen.putImageData(image, 0, 0);
    return canvas;
  }
}
