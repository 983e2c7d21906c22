// @ts-check
/** Writes the numbers of a point, the pins and the legend into the page. */

import { LEVEL_COLORS, PIN_COLORS, css } from "./colors.js";
import { drawColorBar, heatScale } from "./heat.js";
import { IGNORED } from "./measures.js";

/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */
/** @typedef {import("./measures.js").Numbers} Numbers */
/** @typedef {import("./state.js").State} State */

const MINUS = "\u2212";
const MISSING_TEXT = "\u2013";

/**
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) {
    throw new Error(`The page has no element ${id}.`);
  }
  return found;
}

/**
 * @param {number | null} value
 * @param {number} digits
 */
export function formatNumber(value, digits) {
  if (value === null || !Number.isFinite(value)) {
    return MISSING_TEXT;
  }
  return value.toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1").replace("-", MINUS);
}

/** @param {number | null} value */
function formatPx(value) {
  const text = formatNumber(value, value !== null && Math.abs(value) >= 100 ? 0 : 1);
  return text === MISSING_TEXT ? text : `${text} px`;
}

/** @param {number | null | undefined} share */
function formatShare(share) {
  const text = formatNumber(share === undefined || share === null ? null : 100 * share, 0);
  return text === MISSING_TEXT ? text : `${text} %`;
}

/**
 * @param {Model} model
 * @param {number | null} label
 */
function nameOf(model, label) {
  return label === null ? null : (model.classes[label]?.name ?? "ignored");
}

/**
 * Write the numbers of a point.
 *
 * @param {Model} model
 * @param {Numbers} numbers
 * @param {number} beyond Number of points beyond the margin.
 */
export function showNumbers(model, numbers, beyond) {
  const { x, y } = numbers.location;
  byId("place").textContent = `${trim(x)}, ${trim(y)}`;
  showClass("predicted", model, numbers.predicted);
  showClass("true", model, numbers.truth);
  const rows = {
    dilation: [formatPx(numbers.dilation), formatPx(numbers.plainDilation)],
    length: [formatPx(numbers.offsetLength), formatPx(0)],
    offset: [`${formatNumber(numbers.offset[0], 1)}, ${formatNumber(numbers.offset[1], 1)}`, ""],
    modulation: [formatNumber(numbers.modulation, 2), "1.00"],
    outside: numbers.outside.map(formatShare),
    predicted: (numbers.onPredicted ?? []).map(formatShare),
    true: (numbers.onTrue ?? []).map(formatShare),
  };
  for (const [name, values] of Object.entries(rows)) {
    const cells = document.querySelectorAll(`[data-number="${name}"] td`);
    cells.forEach((cell, i) => (cell.textContent = values[i] ?? ""));
  }
  byId("count").textContent = `${numbers.points} sampling points`;
  byId("beyond").textContent = beyond > 0 ? `${beyond} beyond the margin` : "";
  const { notFinite } = numbers;
  byId("not-finite").textContent = notFinite > 0 ? `${notFinite} not finite` : "";
}

/**
 * @param {string} which
 * @param {Model} model
 * @param {number | null} label
 */
function showClass(which, model, label) {
  const element = byId(`${which}-class`);
  element.hidden = label === null;
  const color = model.classes[label ?? IGNORED]?.color ?? [128, 128, 128];
  /** @type {HTMLElement} */ (element.querySelector(".swatch")).style.background = css(color);
  /** @type {HTMLElement} */ (element.querySelector("b")).textContent = nameOf(model, label);
}

/** @param {number} value */
function trim(value) {
  return formatNumber(value, Number.isInteger(value) ? 0 : 1);
}

/**
 * A sentence with the numbers of a point, for screen readers.
 *
 * @param {Model} model
 * @param {Numbers} numbers
 */
export function summarize(model, numbers) {
  const { location, predicted, truth } = numbers;
  const parts = [`Location ${trim(location.x)}, ${trim(location.y)}`];
  if (predicted !== null) {
    parts.push(`predicted ${nameOf(model, predicted)}`);
  }
  if (truth !== null) {
    parts.push(`true ${nameOf(model, truth)}`);
  }
  if (numbers.plainDilation !== null) {
    const plain = formatPx(numbers.plainDilation);
    parts.push(`effective dilation ${formatPx(numbers.dilation)}, plain ${plain}`);
  }
  parts.push(`mean offset length ${formatPx(numbers.offsetLength)}`);
  parts.push(`${formatShare(numbers.outside[0])} outside the image`);
  const onObject = numbers.onTrue ?? numbers.onPredicted;
  if (onObject !== null && !Number.isNaN(onObject[0])) {
    parts.push(`${formatShare(onObject[0])} on the same object`);
  }
  return `${parts.join("; ")}.`;
}

/**
 * List the pins.
 *
 * @param {Model} model
 * @param {Numbers[]} pins
 */
export function showPins(model, pins) {
  byId("pin-table").hidden = pins.length === 0;
  byId("pin-hint").hidden = pins.length > 0;
  byId("pins").replaceChildren(...pins.map((pin, i) => makePinRow(model, pin, i)));
}

/**
 * @param {Model} model
 * @param {Numbers} pin
 * @param {number} index
 */
function makePinRow(model, pin, index) {
  const go = makeButton(String(index + 1), "go", index, `Go to pin ${index + 1}`);
  go.style.background = PIN_COLORS[index % PIN_COLORS.length];
  const remove = makeButton("\u00d7", "remove", index, `Remove pin ${index + 1}`);
  const onObject = pin.onTrue ?? pin.onPredicted;
  const cells = [
    go,
    nameOf(model, pin.predicted ?? pin.truth) ?? `${trim(pin.location.x)}, ${trim(pin.location.y)}`,
    formatPx(pin.dilation),
    formatShare(onObject?.[0]),
    remove,
  ];
  const row = document.createElement("tr");
  row.append(
    ...cells.map((content) => {
      const cell = document.createElement("td");
      cell.append(content);
      return cell;
    }),
  );
  return row;
}

/**
 * @param {string} text
 * @param {string} action
 * @param {number} index
 * @param {string} label
 */
function makeButton(text, action, index, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = `pin-${action}`;
  button.textContent = text;
  button.dataset.action = action;
  button.dataset.index = String(index);
  button.setAttribute("aria-label", label);
  return button;
}

/**
 * Mark the chosen layer and the layers of its cascade in the list.
 *
 * @param {Model} model
 * @param {State} state
 * @param {Layer[]} traced In forward order.
 */
export function showLayers(model, state, traced) {
  document.querySelectorAll("#layers label").forEach((label, i) => {
    const level = traced.length - 1 - traced.indexOf(model.layers[i]);
    const isTraced = traced.includes(model.layers[i]);
    const points = traced
      .slice(-level - 1)
      .reduce((count, layer) => count * layer.groups * layer.taps, 1);
    const dot = /** @type {HTMLElement} */ (label.querySelector(".level"));
    dot.style.background = isTraced ? LEVEL_COLORS[level % LEVEL_COLORS.length] : "transparent";
    const count = /** @type {HTMLElement} */ (label.querySelector(".points"));
    count.textContent = isTraced ? `${points} points` : "";
    const input = /** @type {HTMLInputElement} */ (label.querySelector("input"));
    input.checked = i === state.layer;
  });
}

/**
 * Write the legend of the heat map.
 *
 * @param {Model} model
 * @param {Maps} maps
 * @param {State} state
 */
export function showLegend(model, maps, state) {
  byId("legend").hidden = state.heat === "none";
  byId("opacity-row").hidden = state.heat === "none" && state.overlay === "none";
  if (state.heat === "none") {
    return;
  }
  const layer = model.layers[state.layer];
  const scale = heatScale(model, maps, state.heat, layer);
  drawColorBar(/** @type {HTMLCanvasElement} */ (byId("bar")), scale);
  const middle = (scale.low + scale.high) / 2;
  const texts = {
    dilation: [formatPx(scale.low), `plain ${formatPx(middle)}`, formatPx(scale.high)],
    length: [formatPx(scale.low), formatPx(middle), formatPx(scale.high)],
    modulation: ["0", "1", "2"],
  }[state.heat] ?? ["", "", ""];
  ["low", "middle", "high"].forEach((name, i) => (byId(`legend-${name}`).textContent = texts[i]));
  const captions = {
    dilation: "Mean distance between adjacent sampling points. Relative to the plain grid, the " +
      "scale is the same for all layers.",
    length: "Mean length of the offsets in image pixels; the same scale for all layers.",
    modulation: "Mean modulation of the sampling points, 0 to 2.",
  };
  byId("legend-caption").textContent = captions[/** @type {"dilation"} */ (state.heat)];
}

/**
 * Set the controls to the state.
 *
 * @param {State} state
 */
export function showControls(state) {
  /** @type {HTMLInputElement} */ (byId("cascade")).checked = state.cascade;
  /** @type {HTMLInputElement} */ (byId("opacity")).value = String(state.opacity);
  for (const name of /** @type {const} */ (["heat", "overlay"])) {
    document.querySelectorAll(`input[name="${name}"]`).forEach((input) => {
      /** @type {HTMLInputElement} */ (input).checked =
        /** @type {HTMLInputElement} */ (input).value === state[name];
    });
  }
  document.querySelectorAll("#class-list button").forEach((button, i) => {
    button.setAttribute("aria-pressed", String(i === state.shownClass));
  });
}
