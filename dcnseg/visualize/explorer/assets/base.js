// @ts-check
/** Draws the image with a heat map, an overlay of classes, and a highlighted class. */

import { colorOf } from "./colors.js";
import { contextOf, heatScale } from "./heat.js";

/** @typedef {import("./colors.js").Rgb} Rgb */
/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./data.js").LabelMap} LabelMap */
/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */
/** @typedef {import("./state.js").State} State */

const FRAME = "rgb(10 12 16 / 0.75)";

/** What lies below the sampling points; its parts are painted once. */
export class BasePainter {
  /**
   * @param {Model} model
   * @param {Maps} maps
   * @param {HTMLImageElement} photo
   */
  constructor(model, maps, photo) {
    this.model = model;
    this.maps = maps;
    this.photo = photo;
    /** @type {Map<string, HTMLCanvasElement>} */
    this.paintings = new Map();
  }

  /**
   * Draw everything; lengths are in image pixels.
   *
   * @param {CanvasRenderingContext2D} context
   * @param {State} state
   * @param {number} lineWidth Of the frame.
   */
  draw(context, state, lineWidth) {
    const { width, height } = this.model.image;
    context.save();
    context.beginPath();
    context.rect(0, 0, width, height);
    context.clip();
    context.imageSmoothingQuality = "high";
    context.drawImage(this.photo, 0, 0, width, height);
    if (state.heat !== "none") {
      this.drawHeat(context, state);
    }
    this.drawLabels(context, state);
    context.restore();
    context.lineWidth = lineWidth;
    context.strokeStyle = FRAME;
    context.strokeRect(0, 0, width, height);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {State} state
   */
  drawHeat(context, state) {
    const layer = this.model.layers[state.layer];
    const { width, height } = this.model.image;
    context.globalCompositeOperation = "saturation"; // the image becomes gray
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    context.globalAlpha = state.opacity / 100;
    const [strideY, strideX] = layer.outputStride;
    const left = layer.outputOrigin[1] + 0.5 - 1.5 * strideX;
    const top = layer.outputOrigin[0] + 0.5 - 1.5 * strideY;
    const heat = this.heatCanvas(state.heat, layer);
    context.drawImage(heat, left, top, heat.width * strideX, heat.height * strideY);
    context.globalAlpha = 1;
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {State} state
   */
  drawLabels(context, state) {
    const { width, height } = this.model.image;
    const { prediction, truth } = this.model;
    const map = state.overlay === "truth" ? truth : prediction;
    if (state.overlay !== "none" && map) {
      const colors = this.model.classes.map((entry) => (entry.isObject ? entry.color : null));
      const tint = (/** @type {number} */ i) => toRgba(colors[map.labels[i]] ?? null, 255);
      const edge = (/** @type {number} */ i) => (isEdge(map, i) ? tint(i) : 0);
      context.globalAlpha = state.opacity / 100;
      const fill = this.labelCanvas(`${state.overlay} fill`, map, tint);
      context.drawImage(fill, 0, 0, width, height);
      context.globalAlpha = 1;
      const lines = this.labelCanvas(`${state.overlay} lines`, map, edge);
      context.drawImage(lines, 0, 0, width, height);
    }
    const shown = map ?? truth;
    if (state.shownClass !== null && shown) {
      const name = `${shown === truth ? "truth" : "prediction"} class ${state.shownClass}`;
      const veil = (/** @type {number} */ i) =>
        shown.labels[i] === state.shownClass ? 0 : toRgba([12, 14, 18], 190);
      context.drawImage(this.labelCanvas(name, shown, veil), 0, 0, width, height);
    }
  }

  /**
   * A canvas with a pixel for each output location, and those at the edges once more around it.
   *
   * @param {string} heat
   * @param {Layer} layer
   */
  heatCanvas(heat, layer) {
    const scale = heatScale(this.model, this.maps, heat, layer);
    const values = /** @type {Record<string, Float64Array>} */ (this.maps.heat.get(layer))[heat];
    const [rows, columns] = layer.size;
    const clamp = (/** @type {number} */ i, /** @type {number} */ size) =>
      Math.min(Math.max(i - 1, 0), size - 1);
    return this.paint(`${heat} ${layer.name}`, columns + 2, rows + 2, (column, row) => {
      const value = values[clamp(row, rows) * columns + clamp(column, columns)];
      return toRgba(colorOf(scale, value), 255);
    });
  }

  /**
   * @param {string} name
   * @param {LabelMap} map
   * @param {(index: number) => number} color
   */
  labelCanvas(name, map, color) {
    const { width, height } = map;
    return this.paint(name, width, height, (column, row) => color(row * width + column));
  }

  /**
   * A canvas whose pixels are computed once.
   *
   * @param {string} name
   * @param {number} width
   * @param {number} height
   * @param {(column: number, row: number) => number} color RGBA as a little-endian number.
   */
  paint(name, width, height, color) {
    let canvas = this.paintings.get(name);
    if (canvas === undefined) {
      canvas = document.createElement("canvas");
      canvas.width = width;
      canvas.height = height;
      const pixels = new ImageData(width, height);
      const words = new Uint32Array(pixels.data.buffer);
      for (let i = 0; i < words.length; i++) {
        words[i] = color(i % width, Math.floor(i / width));
      }
      contextOf(canvas).putImageData(pixels, 0, 0);
      this.paintings.set(name, canvas);
    }
    return canvas;
  }
}

/**
 * Whether a neighbor of a pixel has another label.
 *
 * @param {LabelMap} map
 * @param {number} i
 */
function isEdge({ width, height, labels }, i) {
  const column = i % width;
  const row = (i - column) / width;
  return (
    (column > 0 && labels[i - 1] !== labels[i]) ||
    (column < width - 1 && labels[i + 1] !== labels[i]) ||
    (row > 0 && labels[i - width] !== labels[i]) ||
    (row < height - 1 && labels[i + width] !== labels[i])
  );
}

/**
 * @param {Rgb | null} color
 * @param {number} alpha 0 to 255.
 */
function toRgba(color, alpha) {
  return color === null
    ? 0
    : ((alpha << 24) | (color[2] << 16) | (color[1] << 8) | Math.round(color[0])) >>> 0;
}
