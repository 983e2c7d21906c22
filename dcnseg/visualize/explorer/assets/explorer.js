// @ts-check
/** The state of the page, and what follows from a change of it. */

import { describeTrace } from "./measures.js";
import {
  byId,
  showControls,
  showLayers,
  showLegend,
  showNumbers,
  showPins,
  summarize,
} from "./readout.js";
import { traceCascade } from "./sampling.js";
import { MAX_PINS, fromHash, initialState, snap, toHash, tracedLayers } from "./state.js";

/** @typedef {import("./data.js").Model} Model */
/** @typedef {import("./measures.js").Maps} Maps */
/** @typedef {import("./state.js").Point} Point */
/** @typedef {import("./state.js").State} State */
/** @typedef {import("./view.js").View} View */

const HASH_DELAY = 300; // milliseconds
const ANNOUNCEMENT_DELAY = 500;

/** The page. */
export class Explorer {
  /**
   * @param {Model} model
   * @param {Maps} maps
   * @param {View} view
   */
  constructor(model, maps, view) {
    this.model = model;
    this.maps = maps;
    this.view = view;
    this.state = fromHash(window.location.hash, model, initialState(model));
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
