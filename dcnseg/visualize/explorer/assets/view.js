// @ts-check
/** The stage: the way between the window and the image, and the sampling points. */

import { BasePainter } from "./base.js";
import { LEVEL_COLORS, PIN_COLORS } from "./colors.js";
import { contextOf } from "./heat.js";
import { adjacentTaps, quantile } from "./measures.js";
import { cascadeOf, traceCascade } from "./sampling.js";

/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */
/** @typedef {import("./sampling.js").Level} Level */
/** @typedef {import("./sampling.js").Trace} Trace */
/** @typedef {import("./state.js").Point} Point */
/** @typedef {import("./state.js").State} State */

/**
 * What is drawn over the image.
 *
 * @typedef {object} Frame
 * @property {Layer} layer The last layer of the cascade.
 * @property {Trace} trace
 * @property {Trace} plain
 * @property {Trace[]} pins
 */

const MARGINS = [0.03, 0.12]; // limits, as shares of the longer side
const LEVEL_RADII = [6, 3.9, 2.6]; // in CSS pixels
const LARGEST_RADIUS = 1.42; // of a point with modulation 2 and of one with modulation 1
const WEIGHT_STEPS = 4; // drawn steps of the modulation for each 1
const LOCATION_COLOR = "#28e646";
const PLAIN_COLOR = "#dfe3ea";
const INK = "rgb(10 12 16 / 0.75)";

/**
 * The width of the margin around the image in image pixels: most points outside fit into it.
 *
 * @param {Model} model
 */
function chooseMargin(model) {
  const { width, height } = model.image;
  const layers = cascadeOf(model.layers, model.layers.length - 1, model.cascadeDepth, 6000);
  const excess = [];
  for (const x of [0, width / 2, width - 1]) {
    for (const y of [0, height / 2, height - 1]) {
      const { xy } = traceCascade(layers, x, y, false).levels[layers.length - 1];
      for (let i = 0; i < xy.length; i += 2) {
        const outside = [-xy[i], -xy[i + 1], xy[i] - width + 1, xy[i + 1] - height + 1];
        excess.push(Math.max(0, ...outside));
      }
    }
  }
  const longer = Math.max(width, height);
  const wanted = 1.08 * quantile(Float64Array.from(excess.filter((value) => value > 0)), 0.95);
  return Math.min(Math.max(wanted, MARGINS[0] * longer), MARGINS[1] * longer);
}

/** The two canvases of the page, and the way from image pixels to theirs. */
export class View {
  /**
   * @param {Model} model
   * @param {Maps} maps
   * @param {HTMLElement} stage
   * @param {HTMLImageElement} photo
   */
  constructor(model, maps, stage, photo) {
    this.model = model;
    this.stage = stage;
    this.painter = new BasePainter(model, maps, photo);
    this.margin = chooseMargin(model);
    this.scale = 1; // CSS pixels for each image pixel
    this.ratio = 1; // device pixels for each CSS pixel
    this.base = /** @type {HTMLCanvasElement} */ (stage.querySelector("#base"));
    this.points = /** @type {HTMLCanvasElement} */ (stage.querySelector("#points"));
    /** @type {Map<string, HTMLCanvasElement>} */
    this.dots = new Map();
    /** @type {Frame | null} */
    this.frame = null;
  }

  /**
   * Fit the stage into a box, in CSS pixels.
   *
   * @param {number} width
   * @param {number} height
   */
  resize(width, height) {
    const { image, margin } = { image: this.model.image, margin: 2 * this.margin };
    const scale = Math.min(width / (image.width + margin), height / (image.height + margin));
    this.scale = Math.max(scale, 0.01);
    this.ratio = Math.min(window.devicePixelRatio || 1, 3);
    this.dots.clear();
    const size = [image.width, image.height].map((side) => (side + margin) * this.scale);
    this.stage.style.width = `${size[0]}px`;
    this.stage.style.height = `${size[1]}px`;
    for (const canvas of [this.base, this.points]) {
      canvas.width = Math.max(1, Math.round(size[0] * this.ratio));
      canvas.height = Math.max(1, Math.round(size[1] * this.ratio));
    }
  }

  /**
   * The point of the image at a position in the window.
   *
   * @param {number} clientX
   * @param {number} clientY
   * @returns {Point}
   */
  toImage(clientX, clientY) {
    const box = this.stage.getBoundingClientRect();
    const at = (/** @type {number} */ position) => position / this.scale - this.margin - 0.5;
    const left = box.left + this.stage.clientLeft;
    const top = box.top + this.stage.clientTop;
    return { x: at(clientX - left), y: at(clientY - top) };
  }

  /**
   * A coordinate of the image on the stage, in CSS pixels.
   *
   * @param {number} position
   */
  toStage(position) {
    return (position + 0.5 + this.margin) * this.scale;
  }

  /**
   * Draw the image, the heat map and the overlay.
   *
   * @param {State} state
   */
  drawBase(state) {
    const context = contextOf(this.base);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.base.width, this.base.height);
    const unit = this.scale * this.ratio;
    context.setTransform(unit, 0, 0, unit, this.margin * unit, this.margin * unit);
    this.painter.draw(context, state, 1 / this.scale);
  }

  /**
   * Draw the pins, the plain grid and the sampling points.
   *
   * @param {Frame} frame
   */
  drawPoints(frame) {
    this.frame = frame;
    const context = contextOf(this.points);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.points.width, this.points.height);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0); // CSS pixels
    const { levels } = frame.trace;
    frame.pins.forEach((pin, i) => {
      const color = PIN_COLORS[i % PIN_COLORS.length];
      this.drawLevel(context, pin.levels[pin.levels.length - 1], color, levels.length - 1);
    });
    this.drawPlain(context, frame);
    for (let i = levels.length - 1; i >= 0; i--) {
      this.drawLevel(context, levels[i], LEVEL_COLORS[i % LEVEL_COLORS.length], i);
    }
    frame.pins.forEach((pin, i) => this.drawMarker(context, pin.location, i));
    this.drawLocation(context, frame.trace.location);
  }

  /**
   * The plain grid: its points, the lines between the taps of the last layer, and their offsets.
   *
   * @param {CanvasRenderingContext2D} context
   * @param {Frame} frame
   */
  drawPlain(context, { layer, trace, plain }) {
    const depth = plain.levels.length;
    const first = plain.levels[0].xy;
    const at = (/** @type {Float64Array} */ xy, /** @type {number} */ tap) =>
      /** @type {[number, number]} */ ([xy[2 * tap], xy[2 * tap + 1]]);
    const mesh = adjacentTaps(layer).map(([a, b]) => [at(first, a), at(first, b)]);
    this.drawLines(context, mesh, PLAIN_COLOR, 1);
    this.drawLevel(context, withoutRepetitions(plain.levels[depth - 1]), PLAIN_COLOR, 2);
    const moved = trace.levels[0].xy;
    const offsets = Array.from(trace.levels[0].weights, (_, tap) => [
      at(first, tap),
      at(moved, tap),
    ]);
    this.drawLines(context, offsets, LEVEL_COLORS[0], depth === 1 ? 1.5 : 1);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {[number, number][][]} lines Pairs of points in image pixels.
   * @param {string} color
   * @param {number} width
   */
  drawLines(context, lines, color, width) {
    context.beginPath();
    for (const [[x, y], [toX, toY]] of lines) {
      if (!Number.isNaN(x + y + toX + toY)) {
        context.moveTo(this.toStage(x), this.toStage(y));
        context.lineTo(this.toStage(toX), this.toStage(toY));
      }
    }
    context.lineWidth = width + 1.6;
    context.strokeStyle = "rgb(10 12 16 / 0.45)";
    context.stroke();
    context.lineWidth = width;
    context.strokeStyle = color;
    context.stroke();
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Level} points
   * @param {string} color
   * @param {number} level
   */
  drawLevel(context, { xy, weights }, color, level) {
    const radius = LEVEL_RADII[Math.min(level, 2)] * this.dotScale();
    const dots = Array.from({ length: 2 * WEIGHT_STEPS + 1 }, (_, step) =>
      this.dot(color, radius, step),
    );
    const reach = dots[0].width / 2;
    context.setTransform(1, 0, 0, 1, 0, 0); // device pixels, so that dots are not scaled
    for (let i = 0; i < weights.length; i++) {
      const x = this.toStage(xy[2 * i]) * this.ratio - reach;
      const y = this.toStage(xy[2 * i + 1]) * this.ratio - reach;
      if (!Number.isNaN(x + y + weights[i])) {
        const step = Math.min(Math.round(weights[i] * WEIGHT_STEPS), 2 * WEIGHT_STEPS);
        context.drawImage(dots[step], x, y);
      }
    }
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
  }

  /** The size of the points, which are smaller on small stages. */
  dotScale() {
    const longer = Math.max(this.model.image.width, this.model.image.height) * this.scale;
    return Math.min(Math.max(longer / 620, 0.75), 1.5);
  }

  /**
   * A drawn point, on a canvas of its own: its area and opacity show the modulation.
   *
   * @param {string} color
   * @param {number} radius For a modulation of 1.
   * @param {number} step Of the modulation.
   */
  dot(color, radius, step) {
    const key = `${color} ${radius} ${step}`;
    let canvas = this.dots.get(key);
    if (canvas === undefined) {
      canvas = document.createElement("canvas");
      const weight = step / WEIGHT_STEPS;
      canvas.width = canvas.height = 2 * Math.ceil((LARGEST_RADIUS * radius + 1) * this.ratio);
      const reach = canvas.width / 2 / this.ratio;
      const context = contextOf(canvas);
      context.scale(this.ratio, this.ratio);
      context.globalAlpha = 0.3 + 0.65 * Math.min(weight, 1);
      context.beginPath();
      context.arc(reach, reach, radius * Math.sqrt(Math.max(weight, 0.15)), 0, 2 * Math.PI);
      context.fillStyle = color;
      context.fill();
      context.lineWidth = radius > 3 ? 1 : 0.5;
      context.strokeStyle = INK;
      context.stroke();
      this.dots.set(key, canvas);
    }
    return canvas;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Point} location
   */
  drawLocation(context, location) {
    const half = 5 * this.dotScale();
    const [x, y] = [this.toStage(location.x), this.toStage(location.y)];
    context.strokeStyle = INK;
    context.lineWidth = 4.5;
    context.strokeRect(x - half, y - half, 2 * half, 2 * half);
    context.strokeStyle = LOCATION_COLOR;
    context.lineWidth = 2.2;
    context.strokeRect(x - half, y - half, 2 * half, 2 * half);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Point} location
   * @param {number} index
   */
  drawMarker(context, location, index) {
    const [x, y] = [this.toStage(location.x), this.toStage(location.y)];
    context.beginPath();
    context.arc(x, y, 9, 0, 2 * Math.PI);
    context.fillStyle = PIN_COLORS[index % PIN_COLORS.length];
    context.fill();
    context.lineWidth = 1.5;
    context.strokeStyle = INK;
    context.stroke();
    context.fillStyle = "#101318";
    context.font = "600 11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(String(index + 1), x, y + 0.5);
  }

  /** The number of finite points of the last frame beyond the margin. */
  countBeyond() {
    const levels = this.frame?.trace.levels ?? [];
    const { xy } = levels[levels.length - 1] ?? { xy: new Float64Array() };
    const { width, height } = this.model.image;
    let count = 0;
    for (let i = 0; i < xy.length; i += 2) {
      const beyondX = Math.max(-xy[i], xy[i] - width + 1) - 0.5;
      const beyondY = Math.max(-xy[i + 1], xy[i + 1] - height + 1) - 0.5;
      count += Math.max(beyondX, beyondY) > this.margin ? 1 : 0;
    }
    return count;
  }
}

/**
 * The points of a plain grid, of which most paths of a cascade share their ends.
 *
 * @param {Level} level
 * @returns {Level}
 */
function withoutRepetitions({ xy }) {
  const found = new Map();
  for (let i = 0; i < xy.length; i += 2) {
    found.set(`${xy[i].toFixed(2)} ${xy[i + 1].toFixed(2)}`, [xy[i], xy[i + 1]]);
  }
  const weights = new Float64Array(found.size).fill(1);
  return { xy: Float64Array.from([...found.values()].flat()), weights };
}
