// @ts-check
/** Color maps and the colors of points; color-blind people can tell them apart. */

/** @typedef {[number, number, number]} Rgb */

/**
 * A heat map: its color map, and the values at both ends of the scale.
 *
 * @typedef {object} HeatScale
 * @property {Rgb[]} stops
 * @property {number} low
 * @property {number} high
 */

/** Blue, white, red: smaller than, equal to and greater than the plain grid. */
export const DIVERGING = [
  rgb("#2166ac"),
  rgb("#67a9cf"),
  rgb("#f7f7f7"),
  rgb("#ef8a62"),
  rgb("#b2182b"),
];

/** Purple, white, orange: modulation below, at and above 1. */
export const AROUND_ONE = [
  rgb("#542788"),
  rgb("#998ec3"),
  rgb("#f7f7f7"),
  rgb("#f1a340"),
  rgb("#b35806"),
];

/** Dark to bright, "inferno" of matplotlib. */
export const SEQUENTIAL = [
  rgb("#000004"),
  rgb("#420a68"),
  rgb("#932667"),
  rgb("#dd513a"),
  rgb("#fca50a"),
  rgb("#fcffa4"),
];

/** Of the levels of a cascade, from the last layer back. */
export const LEVEL_COLORS = ["#ff2e63", "#ff9f1c", "#ffe45e"];

export const PIN_COLORS = ["#56b4e9", "#c59bff", "#3ddbb4", "#ff9ecb", "#a8d93f", "#7aa2ff"];

/** @type {Rgb} The color of values that are not finite. */
export const MISSING = [255, 0, 255];

/**
 * @param {string} text "#rrggbb"
 * @returns {Rgb}
 */
export function rgb(text) {
  const value = parseInt(text.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * The color of a value on a scale; values beyond its ends have the color of the end.
 *
 * @param {HeatScale} scale
 * @param {number} value
 * @returns {Rgb}
 */
export function colorOf(scale, value) {
  if (Number.isNaN(value)) {
    return MISSING;
  }
  const share = Math.min(Math.max((value - scale.low) / (scale.high - scale.low), 0), 1);
  const at = share * (scale.stops.length - 1);
  const index = Math.min(Math.floor(at), scale.stops.length - 2);
  const [first, second] = [scale.stops[index], scale.stops[index + 1]];
  const mix = (/** @type {number} */ i) => first[i] + (second[i] - first[i]) * (at - index);
  return [mix(0), mix(1), mix(2)];
}

/**
 * @param {Rgb} color
 * @param {number} alpha
 */
export function css([red, green, blue], alpha = 1) {
  return `rgb(${Math.round(red)} ${Math.round(green)} ${Math.round(blue)} / ${alpha})`;
}
