// @ts-check
/** Starts the page. */

import { connectControls, connectKeyboard, connectPointer } from "./controls.js";
import { readModel } from "./data.js";
import { Explorer } from "./explorer.js";
import { computeMaps } from "./measures.js";
import { byId } from "./readout.js";
import { fromHash } from "./state.js";
import { View } from "./view.js";

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
