// @ts-check
/** The scales of the heat maps. */

import { AROUND_ONE, DIVERGING, SEQUENTIAL, colorOf, css } from "./colors.js";
import { quantile } from "./measures.js";

/** @typedef {import("./colors.js").HeatScale} HeatScale */
/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */

const RANGES = [0.25, 1]; // limits for the effective dilation, as shares of the plain one

/**
 * The scale of a heat map, the same for all layers except for the unit.
 *
 * @param {Model} model
 * @param {Maps} maps
 * @param {string} heat
 * @param {Layer} layer
 * @returns {HeatScale}
 */
export function heatScale(model, maps, heat, layer) {
  const values = (/** @type {Layer} */ each) =>
    /** @type {Record<string, Float64Array>} */ (maps.heat.get(each))[heat];
  if (heat === "modulation") {
    return { stops: AROUND_ONE, low: 0, high: 2 };
  }
  if (heat === "length") {
    const high = Math.max(...model.layers.map((each) => quantile(values(each), 0.99)));
    return { stops: SEQUENTIAL, low: 0, high: high || 1 };
  }
  const changes = model.layers.map((each) => {
    const plain = each.plainDilation ?? NaN;
    return quantile(values(each).map((value) => Math.abs(value / plain - 1)), 0.95);
  });
  const wanted = Math.ceil(Math.max(...changes) * 20) / 20;
  const range = Math.min(Math.max(wanted, RANGES[0]), RANGES[1]);
  const plain = layer.plainDilation ?? 1;
  return { stops: DIVERGING, low: plain * (1 - range), high: plain * (1 + range) };
}

/**
 * Draw the color bar of a heat map.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {HeatScale} scale
 */
export function drawColorBar(canvas, scale) {
  const context = contextOf(canvas);
  for (let x = 0; x < canvas.width; x++) {
    const value = scale.low + ((scale.high - scale.low) * x) / (canvas.width - 1);
    context.fillStyle = css(colorOf(scale, value));
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/** @param {HTMLCanvasElement} canvas */
export function contextOf(canvas) {
  return /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
}
