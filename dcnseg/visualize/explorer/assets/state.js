// @ts-check
/** What the page shows, and its form in the URL. */

import { cascadeOf, locationOf, nearestPlace } from "./sampling.js";

/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {{ x: number, y: number }} Point In image pixels. */

/**
 * @typedef {object} State
 * @property {number} layer Index of the chosen layer, the last one of a cascade.
 * @property {boolean} cascade
 * @property {Point} point
 * @property {Point[]} pins
 * @property {string} heat One of HEATS.
 * @property {string} overlay One of OVERLAYS.
 * @property {number} opacity Of heat maps and overlays, 0 to 100.
 * @property {number | null} shownClass Class index.
 */

export const HEATS = ["none", "dilation", "length", "modulation"];
export const OVERLAYS = ["none", "prediction", "truth"];
export const MAX_PINS = 12;

/**
 * @param {Model} model
 * @returns {State}
 */
export function initialState(model) {
  const layer = model.layers.length - 1;
  const [point, ...pins] = [model.point, ...model.pins].map(([x, y]) => ({ x, y }));
  return {
    layer,
    cascade: model.cascade,
    point: pins[0] ?? point,
    pins: pins.map((pin) => snap(model.layers[layer], pin)).slice(0, MAX_PINS),
    heat: "none",
    overlay: "none",
    opacity: 60,
    shownClass: null,
  };
}

/**
 * The nearest output location of a layer.
 *
 * @param {Layer} layer
 * @param {Point} point
 * @returns {Point}
 */
export function snap(layer, point) {
  return locationOf(layer, nearestPlace(layer, point.x, point.y));
}

/**
 * The layers that are traced: the chosen one, or the cascade that ends at it.
 *
 * @param {Model} model
 * @param {Pick<State, "layer" | "cascade">} state
 */
export function tracedLayers(model, state) {
  const depth = state.cascade ? model.cascadeDepth : 1;
  return cascadeOf(model.layers, state.layer, depth, model.maxPoints);
}

/**
 * The state as the part of the URL behind "#".
 *
 * @param {State} state
 */
export function toHash(state) {
  const parts = [`layer=${state.layer + 1}`, `point=${toText(state.point)}`];
  if (state.cascade) {
    parts.push("cascade=1");
  }
  if (state.pins.length) {
    parts.push(`pins=${state.pins.map(toText).join(";")}`);
  }
  if (state.heat !== "none") {
    parts.push(`heat=${state.heat}`);
  }
  if (state.overlay !== "none") {
    parts.push(`overlay=${state.overlay}`);
  }
  if (state.shownClass !== null) {
    parts.push(`class=${state.shownClass}`);
  }
  return `#${parts.join("&")}&opacity=${state.opacity}`;
}

/** @param {Point} point */
function toText(point) {
  return [point.x, point.y].map((value) => String(Number(value.toFixed(2)))).join(",");
}

/**
 * Read a hash; what it lacks or has wrong stays as in `state`.
 *
 * @param {string} hash
 * @param {Model} model
 * @param {State} state
 * @returns {State}
 */
export function fromHash(hash, model, state) {
  const given = new URLSearchParams(hash.slice(1));
  if (!given.has("layer")) {
    return state;
  }
  const pick = (/** @type {string} */ name, /** @type {string[]} */ known) =>
    known.includes(given.get(name) ?? "") ? String(given.get(name)) : "none";
  const layer = numberIn(given.get("layer"), 1, model.layers.length) ?? state.layer + 1;
  const pins = (given.get("pins") ?? "").split(";").map(toPoint);
  return {
    layer: layer - 1,
    cascade: given.get("cascade") === "1",
    point: toPoint(given.get("point") ?? "") ?? state.point,
    pins: pins.filter((pin) => pin !== null).slice(0, MAX_PINS),
    heat: pick("heat", HEATS),
    overlay: pick("overlay", OVERLAYS),
    opacity: numberIn(given.get("opacity"), 0, 100) ?? state.opacity,
    shownClass: numberIn(given.get("class"), 0, model.classes.length - 1),
  };
}

/**
 * @param {string | null} text
 * @param {number} low
 * @param {number} high
 */
function numberIn(text, low, high) {
  const value = Number.parseInt(text ?? "", 10);
  return value >= low && value <= high ? value : null;
}

/**
 * @param {string} text "x,y"
 * @returns {Point | null}
 */
function toPoint(text) {
  const [x, y] = text.split(",").map(Number.parseFloat);
  return Number.isFinite(x) && Number.isFinite(y) ? { x, y } : null;
}
