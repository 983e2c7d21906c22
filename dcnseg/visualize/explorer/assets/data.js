// @ts-check
/** Decodes the data of the page. Pairs are (y, x); positions are in pixels of the image. */

/**
 * A deformable layer.
 *
 * @typedef {object} Layer
 * @property {string} name
 * @property {number} groups Offset groups.
 * @property {number} taps Taps of the kernel.
 * @property {[number, number]} kernel
 * @property {[number, number]} size Of the output map: rows, columns.
 * @property {Float32Array} offset In pixels of the input map, [groups, taps, 2, rows, columns].
 * @property {Float32Array | null} mask Modulation, 0 to 2, [groups, taps, rows, columns].
 * @property {[number, number][]} tapSteps Taps of the plain grid in pixels of the input map.
 * @property {[number, number]} inputStride Image pixels for each pixel of the input map.
 * @property {[number, number]} outputStride Image pixels between two output locations.
 * @property {[number, number]} outputOrigin The first output location.
 * @property {number | null} plainDilation Of the plain grid; null for a 1x1 kernel.
 */

/**
 * A map of class indices, perhaps smaller than the image; 255 is ignored.
 *
 * @typedef {object} LabelMap
 * @property {number} width
 * @property {number} height
 * @property {Uint8Array} labels
 * @property {Int16Array | Int32Array} objects The number of the object or of the background at each
 *   pixel; 0 for objects that are too small to count, -1 where ignored.
 */

/**
 * @typedef {object} ClassEntry
 * @property {string} name
 * @property {[number, number, number]} color
 * @property {boolean} isObject Whether it is not the background.
 */

/**
 * Everything that the page knows.
 *
 * @typedef {object} Model
 * @property {{ width: number, height: number }} image
 * @property {Layer[]} layers In forward order.
 * @property {ClassEntry[]} classes
 * @property {LabelMap | null} prediction
 * @property {LabelMap | null} truth
 * @property {[number, number]} point The point (x, y) at the start.
 * @property {boolean} cascade Whether points are traced in cascade at the start.
 * @property {[number, number][]} pins Points (x, y) that are pinned at the start.
 * @property {number} cascadeDepth Number of layers of a cascade.
 * @property {number} maxPoints Of a cascade.
 */

const NOT_FINITE = -32768;
const MASK_STEPS = 127;
const MASK_NOT_FINITE = 255;

/**
 * Read the values and arrays that the page embeds.
 *
 * @returns {Promise<Model>}
 */
export async function readModel() {
  const values = JSON.parse(textOf("values"));
  const buffer = await inflate(textOf("blob").trim());
  return {
    ...values,
    layers: values.layers.map((/** @type {any} */ entry) => readLayer(entry, buffer)),
    prediction: readLabels(values.prediction, buffer),
    truth: readLabels(values.truth, buffer),
  };
}

/** @param {string} id */
function textOf(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id)).textContent ?? "";
}

/**
 * Decode base64, and decompress with zlib.
 *
 * @param {string} text
 * @returns {Promise<ArrayBuffer>}
 */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/**
 * @param {any} entry
 * @param {ArrayBuffer} buffer
 * @returns {Layer}
 */
function readLayer(entry, buffer) {
  return {
    ...entry,
    offset: readOffset(entry, buffer),
    mask: entry.mask === null ? null : readMask(entry.mask, buffer),
  };
}

/**
 * @param {any} entry
 * @param {ArrayBuffer} buffer
 * @returns {Float32Array}
 */
function readOffset(entry, buffer) {
  const part = slice(entry.offset, buffer);
  if (entry.offset.type === "float32") {
    return new Float32Array(part);
  }
  // Exact, because the unit is a power of two.
  const read = (/** @type {number} */ step) => (step === NOT_FINITE ? NaN : step * entry.unit);
  return Float32Array.from(new Int16Array(part), read);
}

/**
 * @param {any} entry
 * @param {ArrayBuffer} buffer
 * @returns {Float32Array}
 */
function readMask(entry, buffer) {
  const read = (/** @type {number} */ step) => (step === MASK_NOT_FINITE ? NaN : step / MASK_STEPS);
  return Float32Array.from(new Uint8Array(slice(entry, buffer)), read);
}

/**
 * @param {any} entry
 * @param {ArrayBuffer} buffer
 * @returns {LabelMap | null}
 */
function readLabels(entry, buffer) {
  if (entry === null) {
    return null;
  }
  const part = slice(entry.objects, buffer);
  return {
    ...entry,
    labels: new Uint8Array(slice(entry.labels, buffer)),
    objects: entry.objects.type === "int16" ? new Int16Array(part) : new Int32Array(part),
  };
}

/**
 * @param {{ start: number, bytes: number }} entry
 * @param {ArrayBuffer} buffer
 */
function slice(entry, buffer) {
  return buffer.slice(entry.start, entry.start + entry.bytes);
}
