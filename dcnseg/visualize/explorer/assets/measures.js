// @ts-check
/** Numbers about sampling points, and the values of the heat maps. */

import { displacementOf, modulationOf, nearestPlace, offsetOf, placesOf } from "./sampling.js";

/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./data.js").LabelMap} LabelMap */
/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./sampling.js").Level} Level */
/** @typedef {import("./sampling.js").Trace} Trace */

export const IGNORED = 255; // class index
const IGNORED_OBJECT = -1;
const OUTSIDE = -2;

/**
 * The mean distance between adjacent sampling points at each output location, in image pixels.
 *
 * @param {Layer} layer
 */
export function effectiveDilation(layer) {
  const pairs = adjacentTaps(layer);
  return mapPlaces(layer, (place) => {
    let sum = 0;
    for (let group = 0; group < layer.groups; group++) {
      for (const [a, b] of pairs) {
        sum += tapDistance(layer, group * layer.taps + a, group * layer.taps + b, place);
      }
    }
    return sum / (layer.groups * pairs.length);
  });
}

/**
 * Pairs of taps that are neighbors in the kernel.
 *
 * @param {Layer} layer
 * @returns {[number, number][]}
 */
export function adjacentTaps(layer) {
  const [rows, columns] = layer.kernel;
  /** @type {[number, number][]} */
  const pairs = [];
  for (let tap = 0; tap < rows * columns; tap++) {
    if (tap + columns < rows * columns) {
      pairs.push([tap, tap + columns]);
    }
    if ((tap + 1) % columns > 0) {
      pairs.push([tap, tap + 1]);
    }
  }
  return pairs;
}

/**
 * @param {Layer} layer
 * @param {number} a
 * @param {number} b
 * @param {number} place
 */
function tapDistance(layer, a, b, place) {
  const dy = displacementOf(layer, a, 0, place, false) - displacementOf(layer, b, 0, place, false);
  const dx = displacementOf(layer, a, 1, place, false) - displacementOf(layer, b, 1, place, false);
  return Math.hypot(dx, dy);
}

/**
 * The mean length of the offsets at each output location, in image pixels.
 *
 * @param {Layer} layer
 */
export function meanOffsetLength(layer) {
  return mapPlaces(layer, (place) =>
    meanOverTaps(layer, (tap) => {
      const dy = offsetOf(layer, tap, 0, place) * layer.inputStride[0];
      const dx = offsetOf(layer, tap, 1, place) * layer.inputStride[1];
      return Math.hypot(dx, dy);
    }),
  );
}

/**
 * The mean modulation of the taps at each output location; 1 without modulation.
 *
 * @param {Layer} layer
 */
export function meanModulation(layer) {
  return mapPlaces(layer, (place) =>
    meanOverTaps(layer, (tap) => modulationOf(layer, tap, place)),
  );
}

/**
 * @param {Layer} layer
 * @param {(place: number) => number} compute
 */
function mapPlaces(layer, compute) {
  return Float64Array.from({ length: placesOf(layer) }, (_, place) => compute(place));
}

/**
 * @param {Layer} layer
 * @param {(tap: number) => number} compute
 */
function meanOverTaps(layer, compute) {
  const taps = layer.groups * layer.taps;
  let sum = 0;
  for (let tap = 0; tap < taps; tap++) {
    sum += compute(tap);
  }
  return sum / taps;
}

/**
 * The mean offset (dx, dy) of the taps at a point, in image pixels.
 *
 * @param {Layer} layer
 * @param {number} x
 * @param {number} y
 * @returns {[number, number]}
 */
export function meanOffset(layer, x, y) {
  const place = nearestPlace(layer, x, y);
  const mean = (/** @type {0 | 1} */ axis) =>
    meanOverTaps(layer, (tap) => offsetOf(layer, tap, axis, place)) * layer.inputStride[axis];
  return [mean(1), mean(0)];
}

/**
 * The value below which a share of the finite values lies.
 *
 * @param {Float64Array} values
 * @param {number} share
 */
export function quantile(values, share) {
  const finite = values.filter(Number.isFinite).sort();
  return finite.length ? finite[Math.round(share * (finite.length - 1))] : 0;
}

/**
 * The index of a map's pixel at a point of the image, or -1 outside.
 *
 * @param {LabelMap} map
 * @param {Model["image"]} image
 * @param {number} x
 * @param {number} y
 */
export function pixelAt(map, image, x, y) {
  if (!isInImage(image, x, y)) {
    return -1;
  }
  const column = Math.floor(((x + 0.5) * map.width) / image.width);
  const row = Math.floor(((y + 0.5) * map.height) / image.height);
  return row * map.width + column;
}

/**
 * @param {Model["image"]} image
 * @param {number} x
 * @param {number} y
 */
export function isInImage(image, x, y) {
  return x >= -0.5 && x < image.width - 0.5 && y >= -0.5 && y < image.height - 0.5;
}

/**
 * The share of the finite points outside the image.
 *
 * @param {Level} level
 * @param {Model["image"]} image
 */
export function outsideShare(level, image) {
  let outside = 0;
  let finite = 0;
  for (let i = 0; i < level.xy.length; i += 2) {
    if (!Number.isNaN(level.xy[i] + level.xy[i + 1])) {
      finite += 1;
      outside += isInImage(image, level.xy[i], level.xy[i + 1]) ? 0 : 1;
    }
  }
  return outside / finite;
}

/**
 * The share of the points, weighted by their modulation, on the object of the output location.
 * Points on ignored pixels do not count.
 *
 * @param {Trace} trace
 * @param {LabelMap} map
 * @param {Model["image"]} image
 * @returns {number} NaN if the location is on no object and no background.
 */
export function onObjectShare(trace, map, image) {
  const { xy, weights } = trace.levels[trace.levels.length - 1];
  const own = objectAt(map, image, trace.location.x, trace.location.y);
  let sum = 0;
  let all = 0;
  for (let i = 0; i < weights.length; i++) {
    const number = objectAt(map, image, xy[2 * i], xy[2 * i + 1]);
    const isNumber = !Number.isNaN(weights[i] + xy[2 * i] + xy[2 * i + 1]);
    if (isNumber && number !== IGNORED_OBJECT) {
      all += weights[i];
      sum += number === own ? weights[i] : 0;
    }
  }
  return own > 0 ? sum / all : NaN;
}

/**
 * The number of the object at a point.
 *
 * @param {LabelMap} map
 * @param {Model["image"]} image
 * @param {number} x
 * @param {number} y
 */
function objectAt(map, image, x, y) {
  const pixel = pixelAt(map, image, x, y);
  return pixel < 0 ? OUTSIDE : map.objects[pixel];
}

/**
 * Everything that the page tells about a point. Shares are of the deepest level of the cascade.
 *
 * @typedef {object} Numbers
 * @property {{ x: number, y: number }} location
 * @property {number | null} predicted Class index at the location, 255 if ignored, null if none.
 * @property {number | null} truth
 * @property {number} dilation In image pixels, like all lengths.
 * @property {number | null} plainDilation
 * @property {number} offsetLength
 * @property {[number, number]} offset The mean offset (dx, dy).
 * @property {number | null} modulation
 * @property {number} points
 * @property {number} notFinite Number of points at NaN.
 * @property {[number, number]} outside Shares of the deformable and of the plain points.
 * @property {[number, number] | null} onPredicted
 * @property {[number, number] | null} onTrue
 */

/**
 * Maps that are computed once.
 *
 * @typedef {object} Maps
 * @property {Map<Layer, Record<string, Float64Array>>} heat Values of each layer by heat map.
 */

/**
 * @param {Model} model
 * @returns {Maps}
 */
export function computeMaps(model) {
  const heat = new Map();
  for (const layer of model.layers) {
    heat.set(layer, {
      dilation: effectiveDilation(layer),
      length: meanOffsetLength(layer),
      modulation: meanModulation(layer),
    });
  }
  return { heat };
}

/**
 * @param {Model} model
 * @param {Maps} maps
 * @param {Layer} layer The last layer of the cascade.
 * @param {Trace} trace
 * @param {Trace} plain
 * @returns {Numbers}
 */
export function describeTrace(model, maps, layer, trace, plain) {
  const { x, y } = trace.location;
  const place = nearestPlace(layer, x, y);
  const heat = /** @type {Record<string, Float64Array>} */ (maps.heat.get(layer));
  const deepest = trace.levels[trace.levels.length - 1];
  const plainDeepest = plain.levels[plain.levels.length - 1];
  const share = (/** @type {LabelMap | null} */ map) =>
    map && pairOf((from) => onObjectShare(from, map, model.image), trace, plain);
  return {
    location: trace.location,
    predicted: labelAt(model.prediction, model.image, x, y),
    truth: labelAt(model.truth, model.image, x, y),
    dilation: heat.dilation[place],
    plainDilation: layer.plainDilation,
    offsetLength: heat.length[place],
    offset: meanOffset(layer, x, y),
    modulation: layer.mask && heat.modulation[place],
    points: deepest.weights.length,
    notFinite: deepest.xy.filter((value, i) => i % 2 === 0 && Number.isNaN(value)).length,
    outside: [outsideShare(deepest, model.image), outsideShare(plainDeepest, model.image)],
    onPredicted: share(model.prediction),
    onTrue: share(model.truth),
  };
}

/**
 * @template T
 * @param {(value: T) => number} compute
 * @param {T} first
 * @param {T} second
 * @returns {[number, number]}
 */
function pairOf(compute, first, second) {
  return [compute(first), compute(second)];
}

/**
 * The class index at a point; 255 where it is ignored or outside the image, null without a map.
 *
 * @param {LabelMap | null} map
 * @param {Model["image"]} image
 * @param {number} x
 * @param {number} y
 */
function labelAt(map, image, x, y) {
  const pixel = map === null ? -1 : pixelAt(map, image, x, y);
  return map && (pixel < 0 ? IGNORED : map.labels[pixel]);
}
