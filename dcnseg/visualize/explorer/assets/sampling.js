// @ts-check
/** Sampling points; the same arithmetic as `trace_cascade` of dcnseg/visualize/offsets.py. */

/** @typedef {import("./data.js").Layer} Layer */

/**
 * The sampling points of one layer on the way back.
 *
 * @typedef {object} Level
 * @property {Float64Array} xy Positions x, y, x, y, ... in image pixels; NaN for NaN offsets.
 * @property {Float64Array} weights Products of the modulation along the path.
 */

/**
 * @typedef {object} Trace
 * @property {{ x: number, y: number }} location The output location that is used.
 * @property {Level[]} levels From the last layer back; the last level has the most points.
 */

/**
 * Trace a point back through the sampling points of consecutive layers.
 *
 * @param {Layer[]} layers In forward order.
 * @param {number} x
 * @param {number} y
 * @param {boolean} isPlain Whether to ignore the offsets.
 * @returns {Trace}
 */
export function traceCascade(layers, x, y, isPlain) {
  const last = layers[layers.length - 1];
  const location = locationOf(last, nearestPlace(last, x, y));
  let level = { xy: Float64Array.of(location.x, location.y), weights: Float64Array.of(1) };
  const levels = [];
  for (let i = layers.length - 1; i >= 0; i--) {
    level = sampleLayer(layers[i], level, isPlain);
    levels.push(level);
  }
  return { location, levels };
}

/**
 * @param {Layer} layer
 * @param {Level} from
 * @param {boolean} isPlain
 * @returns {Level}
 */
function sampleLayer(layer, from, isPlain) {
  const count = from.weights.length;
  const taps = layer.groups * layer.taps;
  const xy = new Float64Array(2 * count * taps);
  const weights = new Float64Array(count * taps);
  for (let i = 0; i < count; i++) {
    const x = from.xy[2 * i];
    const y = from.xy[2 * i + 1];
    const place = nearestPlace(layer, x, y);
    for (let tap = 0; tap < taps; tap++) {
      const at = i * taps + tap;
      xy[2 * at] = x + displacementOf(layer, tap, 1, place, isPlain);
      xy[2 * at + 1] = y + displacementOf(layer, tap, 0, place, isPlain);
      weights[at] = from.weights[i] * (isPlain ? 1 : modulationOf(layer, tap, place));
    }
  }
  return { xy, weights };
}

/**
 * A tap's position relative to the output location along an axis (0 is y), in image pixels.
 *
 * @param {Layer} layer
 * @param {number} tap Over all offset groups.
 * @param {0 | 1} axis
 * @param {number} place
 * @param {boolean} isPlain
 */
export function displacementOf(layer, tap, axis, place, isPlain) {
  const offset = isPlain ? 0 : offsetOf(layer, tap, axis, place);
  return (offset + layer.tapSteps[tap % layer.taps][axis]) * layer.inputStride[axis];
}

/**
 * An offset in pixels of the layer's input map.
 *
 * @param {Layer} layer
 * @param {number} tap
 * @param {0 | 1} axis
 * @param {number} place
 */
export function offsetOf(layer, tap, axis, place) {
  return layer.offset[(2 * tap + axis) * placesOf(layer) + place];
}

/**
 * @param {Layer} layer
 * @param {number} tap
 * @param {number} place
 */
export function modulationOf(layer, tap, place) {
  return layer.mask === null ? 1 : layer.mask[tap * placesOf(layer) + place];
}

/**
 * The number of output locations.
 *
 * @param {Layer} layer
 */
export function placesOf(layer) {
  return layer.size[0] * layer.size[1];
}

/**
 * The nearest output location, clamped to the map: row * columns + column.
 *
 * @param {Layer} layer
 * @param {number} x
 * @param {number} y
 */
export function nearestPlace(layer, x, y) {
  return nearestIndex(layer, 0, y) * layer.size[1] + nearestIndex(layer, 1, x);
}

/**
 * @param {Layer} layer
 * @param {0 | 1} axis
 * @param {number} position
 */
function nearestIndex(layer, axis, position) {
  const index = (position - layer.outputOrigin[axis]) / layer.outputStride[axis];
  const nearest = Math.floor((Number.isNaN(index) ? 0 : index) + 0.5);
  return Math.min(Math.max(nearest, 0), layer.size[axis] - 1);
}

/**
 * The position of an output location in the image.
 *
 * @param {Layer} layer
 * @param {number} place
 */
export function locationOf(layer, place) {
  const column = place % layer.size[1];
  const row = (place - column) / layer.size[1];
  return {
    x: layer.outputOrigin[1] + layer.outputStride[1] * column,
    y: layer.outputOrigin[0] + layer.outputStride[0] * row,
  };
}

/**
 * The layers of the cascade that ends at a layer: at most `depth`, with at most `maxPoints`.
 *
 * @param {Layer[]} layers
 * @param {number} last Index of the layer.
 * @param {number} depth
 * @param {number} maxPoints
 */
export function cascadeOf(layers, last, depth, maxPoints) {
  let first = last;
  let points = layers[last].groups * layers[last].taps;
  while (first > 0 && last - first + 1 < depth) {
    points *= layers[first - 1].groups * layers[first - 1].taps;
    if (points > maxPoints) {
      break;
    }
    first -= 1;
  }
  return layers.slice(first, last + 1);
}
