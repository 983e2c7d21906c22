// @ts-check
/** Connects the page's controls, the pointer and the keyboard. */

import { byId } from "./readout.js";
import { HEATS, OVERLAYS, snap } from "./state.js";

/** @typedef {import("./explorer.js").Explorer} Explorer */

const CLICK_DISTANCE = 8; // CSS pixels that a click or tap may move
const KEY_STEPS = 5; // output locations for an arrow key with Shift

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
export function connectControls(explorer) {
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
export function connectPointer(explorer) {
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
export function connectKeyboard(explorer) {
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
