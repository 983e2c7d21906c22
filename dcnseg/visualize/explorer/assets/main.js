// @ts-check
/** Connects the page's controls, pointer and keyboard with what it shows. */

import { readModel } from "./data.js";
import { computeMaps, describeTrace } from "./measures.js";
import {
  byId,
  showLayers,
  showLegend,
  showNumbers,
  showPins,
  summarize,
} from "./readout.js";
import { traceCascade } from "./sampling.js";
import {
  HEATS,
  MAX_PINS,
  OVERLAYS,
  fromHash,
  initialState,
  snap,
  toHash,
  tracedLayers,
} from "./state.js";
import { View } from "./view.js";

/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */
/** @typedef {import("./state.js").Point} Point */
/** @typedef {import("./state.js").State} State */

const CLICK_DISTANCE = 8; // CSS pixels that a click or tap may move
const KEY_STEPS = 5; // output locations for an arrow key with Shift
const HASH_DELAY = 300; // milliseconds
const ANNOUNCEMENT_DELAY = 500;

/** The page: its state, and what follows from a change of it. */
class Explorer {
  /**
   * @param {Model} model
   * @param {Maps} maps
   * @param {View} view
   */
  constructor(model, maps, view) {
    this.model = model;
    this.maps = maps;
    this.view = view;
    this.state = fromHash(window.location.hash, model, initialState(model, maps));
    this.isBaseStale = true;
    this.isScheduled = false;
    this.timers = { hash: 0, announcement: 0 };
    this.shownPins = ""; // what the list of pins was made from
  }

  /**
   * Change the state; it is drawn with the next frame.
   *
   * @param {Partial<State>} changes
   */
  set(changes) {
    const moved = Object.keys(changes).every((name) => name === "point" || name === "pins");
    this.state = { ...this.state, ...changes };
    this.schedule(!moved);
  }

  /** @param {boolean} isBaseStale Whether the image must be drawn again, too. */
  schedule(isBaseStale) {
    this.isBaseStale ||= isBaseStale;
    if (!this.isScheduled) {
      this.isScheduled = true;
      window.requestAnimationFrame(() => this.render());
    }
  }

  /** Draw everything that has changed. */
  render() {
    this.isScheduled = false;
    const { model, maps, state, view } = this;
    if (this.isBaseStale) {
      view.drawBase(state);
      showControls(state);
      showLayers(model, state, tracedLayers(model, state));
      showLegend(model, maps, state);
      this.isBaseStale = false;
    }
    const traces = this.trace(state.point);
    const pins = state.pins.map((pin) => this.trace(pin));
    view.drawPoints({ ...traces, pins: pins.map((pin) => pin.trace) });
    showNumbers(model, this.numbers(traces), view.countBeyond());
    this.showPinsOnce(pins);
    this.later("hash", HASH_DELAY, () => history.replaceState(null, "", toHash(this.state)));
  }

  /**
   * The pins change less often than the point.
   *
   * @param {ReturnType<Explorer["trace"]>[]} pins
   */
  showPinsOnce(pins) {
    const { layer, cascade, pins: points } = this.state;
    const key = JSON.stringify([layer, cascade, points]);
    if (key !== this.shownPins) {
      this.shownPins = key;
      showPins(this.model, pins.map((pin) => this.numbers(pin)));
    }
  }

  /**
   * @param {Point} point
   * @param {Partial<Pick<State, "layer" | "cascade">>} options
   */
  trace(point, options = {}) {
    const layers = tracedLayers(this.model, { ...this.state, ...options });
    return {
      layer: layers[layers.length - 1],
      trace: traceCascade(layers, point.x, point.y, false),
      plain: traceCascade(layers, point.x, point.y, true),
    };
  }

  /** @param {ReturnType<Explorer["trace"]>} traces */
  numbers({ layer, trace, plain }) {
    return describeTrace(this.model, this.maps, layer, trace, plain);
  }

  /** Tell screen readers the numbers of the point, when it rests. */
  announce() {
    this.later("announcement", ANNOUNCEMENT_DELAY, () => {
      byId("live").textContent = summarize(this.model, this.numbers(this.trace(this.state.point)));
    });
  }

  /**
   * @param {"hash" | "announcement"} name
   * @param {number} delay
   * @param {() => void} act
   */
  later(name, delay, act) {
    window.clearTimeout(this.timers[name]);
    this.timers[name] = window.setTimeout(act, delay);
  }

  /** Pin the point, or remove the pin that is there. */
  togglePin() {
    const pin = snap(this.model.layers[this.state.layer], this.state.point);
    const index = this.findPin(pin);
    if (index >= 0) {
      this.removePin(index);
    } else {
      this.set({ pins: [...this.state.pins, pin].slice(-MAX_PINS) });
      byId("live").textContent = `Pin ${this.state.pins.length} added.`;
    }
  }

  /** @param {number} index */
  removePin(index) {
    if (index in this.state.pins) {
      this.set({ pins: this.state.pins.filter((_, i) => i !== index) });
      byId("live").textContent = `Pin ${index + 1} removed.`;
    }
  }

  /** @param {Point} point */
  findPin(point) {
    return this.state.pins.findIndex((pin) => Math.hypot(pin.x - point.x, pin.y - point.y) < 0.01);
  }

  /**
   * Move the point by output locations.
   *
   * @param {number} columns
   * @param {number} rows
   */
  move(columns, rows) {
    const layer = this.model.layers[this.state.layer];
    const at = snap(layer, this.state.point);
    const x = at.x + columns * layer.outputStride[1];
    const y = at.y + rows * layer.outputStride[0];
    this.set({ point: snap(layer, { x, y }) });
    this.announce();
  }
}

/**
 * Set the controls to the state.
 *
 * @param {State} state
 */
function showControls(state) {
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

/**
 * The values of a group of radio buttons that can be chosen.
 *
 * @param {string} name
 * @param {string[]} known
 */
function availableValues(name, known) {
  return known.filter((value) => document.querySelector(`input[name="${name}"][value="${value}"]`));
}

/** @param {Explorer} explorer */
function connectControls(explorer) {
  const layers = [...document.querySelectorAll('input[name="layer"]')];
  layers.forEach((input, layer) =>
    input.addEventListener("change", () => explorer.set({ layer })),
  );
  byId("cascade").addEventListener("change", (event) =>
    explorer.set({ cascade: /** @type {HTMLInputElement} */ (event.target).checked }),
  );
  for (const name of ["heat", "overlay"]) {
    byId(name).addEventListener("change", (event) =>
      explorer.set({ [name]: /** @type {HTMLInputElement} */ (event.target).value }),
    );
  }
  byId("opacity").addEventListener("input", (event) =>
    explorer.set({ opacity: Number(/** @type {HTMLInputElement} */ (event.target).value) }),
  );
  document.querySelectorAll("#class-list button").forEach((button, i) =>
    button.addEventListener("click", () =>
      explorer.set({ shownClass: explorer.state.shownClass === i ? null : i }),
    ),
  );
  byId("pins").addEventListener("click", (event) => clickPin(explorer, event));
  byId("theme").addEventListener("click", switchTheme);
  byId("help-button").addEventListener("click", toggleHelp);
}

/**
 * @param {Explorer} explorer
 * @param {Event} event
 */
function clickPin(explorer, event) {
  const { action, index } = /** @type {HTMLElement} */ (event.target).dataset;
  if (action === "remove") {
    explorer.removePin(Number(index));
  } else if (action === "go") {
    explorer.set({ point: explorer.state.pins[Number(index)] });
    explorer.announce();
  }
}

/** @param {Explorer} explorer */
function connectPointer(explorer) {
  const { stage } = explorer.view;
  /** @type {{ x: number, y: number, isClick: boolean } | null} */
  let pressed = null;
  const moveTo = (/** @type {PointerEvent} */ event) =>
    explorer.set({ point: explorer.view.toImage(event.clientX, event.clientY) });
  stage.addEventListener("pointerdown", (event) => {
    if (event.isPrimary && event.button === 0) {
      pressed = { x: event.clientX, y: event.clientY, isClick: true };
      stage.setPointerCapture(event.pointerId);
      moveTo(event);
    }
  });
  stage.addEventListener("pointermove", (event) => {
    if (!event.isPrimary || (event.pointerType === "touch" && pressed === null)) {
      return;
    }
    if (pressed) {
      const distance = Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y);
      pressed.isClick &&= distance < CLICK_DISTANCE;
    }
    moveTo(event);
  });
  stage.addEventListener("pointerup", (event) => {
    if (event.isPrimary && pressed?.isClick) {
      explorer.togglePin();
    }
    pressed = null;
    explorer.announce();
  });
  stage.addEventListener("pointercancel", () => (pressed = null));
}

/** @param {Explorer} explorer */
function connectKeyboard(explorer) {
  document.addEventListener("keydown", (event) => {
    const isHelp = /** @type {HTMLDialogElement} */ (byId("help")).open;
    if (event.ctrlKey || event.metaKey || event.altKey || (isHelp && event.key !== "?")) {
      return;
    }
    const isOnStage = [explorer.view.stage, document.body].includes(
      /** @type {HTMLElement} */ (document.activeElement),
    );
    if ((isOnStage && pressOnStage(explorer, event)) || pressAnywhere(explorer, event.key)) {
      event.preventDefault();
    }
  });
}

/**
 * Keys that other controls use, too. Returns whether the key did something.
 *
 * @param {Explorer} explorer
 * @param {KeyboardEvent} event
 */
function pressOnStage(explorer, event) {
  /** @type {Record<string, [number, number]>} */
  const arrows = {
    ArrowLeft: [-1, 0],
    ArrowRight: [1, 0],
    ArrowUp: [0, -1],
    ArrowDown: [0, 1],
  };
  if (event.key in arrows) {
    const step = event.shiftKey ? KEY_STEPS : 1;
    explorer.move(arrows[event.key][0] * step, arrows[event.key][1] * step);
    return true;
  }
  if (event.key === "Enter") {
    explorer.togglePin();
    return true;
  }
  return false;
}

/**
 * @param {Explorer} explorer
 * @param {string} key
 */
function pressAnywhere(explorer, key) {
  const { model, state } = explorer;
  const next = (/** @type {"heat" | "overlay"} */ name, /** @type {string[]} */ known) => {
    const values = availableValues(name, known);
    explorer.set({ [name]: values[(values.indexOf(state[name]) + 1) % values.length] });
  };
  /** @type {Record<string, () => void>} */
  const actions = {
    c: () => explorer.set({ cascade: !state.cascade }),
    p: () => explorer.togglePin(),
    h: () => next("heat", HEATS),
    o: () => next("overlay", OVERLAYS),
    t: switchTheme,
    "?": toggleHelp,
    delete: () => deletePin(explorer),
    backspace: () => deletePin(explorer),
  };
  const action = actions[key.toLowerCase()];
  const layer = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
  if (action) {
    action();
  } else if (layer in model.layers) {
    explorer.set({ layer });
    explorer.announce();
  }
  return action !== undefined || layer in model.layers;
}

/**
 * Remove the pin at the point, or else the last one.
 *
 * @param {Explorer} explorer
 */
function deletePin(explorer) {
  const { model, state } = explorer;
  const index = explorer.findPin(snap(model.layers[state.layer], state.point));
  explorer.removePin(index >= 0 ? index : state.pins.length - 1);
}

function toggleHelp() {
  const help = /** @type {HTMLDialogElement} */ (byId("help"));
  if (help.open) {
    help.close();
  } else {
    help.showModal();
  }
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : window.matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
}

/**
 * Fit the stage into its box. On narrow pages, the box has the height of the stage.
 *
 * @param {Explorer} explorer
 */
function fit(explorer) {
  const box = byId("stage-box");
  const isNarrow = window.matchMedia("(max-width: 60rem)").matches;
  const height = isNarrow ? 0.6 * window.innerHeight : box.clientHeight;
  explorer.view.resize(box.clientWidth, height);
  explorer.schedule(true);
}

/**
 * The time from a change of the point until it is drawn, in milliseconds.
 *
 * @param {Explorer} explorer
 * @param {number} count Number of random points.
 */
function measureResponse(explorer, count) {
  const { image } = explorer.model;
  const times = Float64Array.from({ length: count }, () => {
    explorer.state.point = { x: Math.random() * image.width, y: Math.random() * image.height };
    const start = performance.now();
    explorer.render();
    return performance.now() - start;
  }).sort();
  const at = (/** @type {number} */ share) => times[Math.floor(share * (count - 1))];
  return { median: at(0.5), p95: at(0.95), most: at(1) };
}

/**
 * For tests and for the browser's console. `options` are `layer` (an index) and `cascade`; by
 * default, those of the page.
 *
 *   pointsAt(x, y, options)   The sampling points as [x, y, weight], as `trace_cascade` orders them
 *   plainAt(x, y, options)    The same of the plain grid
 *   numbersAt(x, y, options)  The numbers of a point
 *   heatValues(name, layer)   The values of a heat map, row by row
 *   drawnPoints()             The points drawn last, as [x, y] in CSS pixels of the stage
 *   state()                   What the page shows
 *   measure(count)            Milliseconds until `count` random points are drawn
 *
 * @param {Explorer} explorer
 */
function makeDebugInterface(explorer) {
  const { model, maps, view } = explorer;
  const listPoints = (/** @type {import("./sampling.js").Trace} */ { levels }) => {
    const { xy, weights } = levels[levels.length - 1];
    return Array.from(weights, (weight, i) => [xy[2 * i], xy[2 * i + 1], weight]);
  };
  return Object.freeze({
    pointsAt: (/** @type {number} */ x, /** @type {number} */ y, options = {}) =>
      listPoints(explorer.trace({ x, y }, options).trace),
    plainAt: (/** @type {number} */ x, /** @type {number} */ y, options = {}) =>
      listPoints(explorer.trace({ x, y }, options).plain),
    numbersAt: (/** @type {number} */ x, /** @type {number} */ y, options = {}) =>
      explorer.numbers(explorer.trace({ x, y }, options)),
    heatValues: (/** @type {string} */ name, /** @type {number} */ layer) =>
      Array.from(maps.heat.get(model.layers[layer])?.[name] ?? []),
    drawnPoints: () =>
      view.frame === null
        ? []
        : listPoints(view.frame.trace).map(([x, y]) => [view.toStage(x), view.toStage(y)]),
    state: () => structuredClone(explorer.state),
    measure: (/** @type {number} */ count) => measureResponse(explorer, count),
  });
}

/** Start the page. */
async function main() {
  const model = await readModel();
  const photo = /** @type {HTMLImageElement} */ (byId("photo"));
  await photo.decode();
  const maps = computeMaps(model);
  const explorer = new Explorer(model, maps, new View(model, maps, byId("stage"), photo));
  connectControls(explorer);
  connectPointer(explorer);
  connectKeyboard(explorer);
  window.addEventListener("resize", () => fit(explorer));
  window.addEventListener("hashchange", () =>
    explorer.set(fromHash(window.location.hash, model, explorer.state)),
  );
  fit(explorer);
  explorer.render();
  Object.defineProperty(window, "dcnsegExplorer", { value: makeDebugInterface(explorer) });
  document.documentElement.dataset.ready = "true";
}

main().catch((error) => {
  byId("problem").hidden = false;
  byId("problem").textContent = `The page cannot be shown: ${error.message}`;
  throw error;
});
