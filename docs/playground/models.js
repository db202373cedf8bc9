// The networks: ONNX files, run by onnxruntime-web in WebAssembly, in this thread.
//
// One thread is enough for networks this small, and the page needs no special headers then.

/** The runtime: its JavaScript, and its WebAssembly of 14 MB. */
const RUNTIME = "onnxruntime/ort.wasm.bundle.min.mjs";
const RUNTIME_WASM = "onnxruntime/ort-wasm-simd-threaded.wasm";
/** onnxruntime-web, once loadRuntime has loaded it. */
let ort = null;

/** Answers that the stated latency is the median of. */
const REMEMBERED = 20;
/** Answers that come before, and are not counted: the first ones are slow. */
const WARM_UP = 5;

/** A network that answers images with logits, and remembers how long its answers took. */
export class Network {
  constructor(session) {
    this.session = session;
    this.milliseconds = [];
  }

  /** Fetches an ONNX file and makes it ready to answer, once the runtime is loaded. Throws an Error
   *  that names the file. */
  static async load(url) {
    const file = await fetchFile(url);
    try {
      const session = await ort.InferenceSession.create(file, { executionProviders: ["wasm"] });
      const network = new Network(session);
      for (let k = 0; k < WARM_UP; k += 1) {
        await network.predict(new Float32Array(28 * 28), 1);
      }
      return network;
    } catch (error) {
      throw new Error(`${url}: ${error.message}`);
    }
  }

  /**
   * @param {Float32Array} images - count × 28 × 28 values from 0 to 1
   * @param {number} count - images
   * @returns {Promise<Float32Array>} logits, count × 10
   */
  async predict(images, count) {
    const [input] = this.session.inputNames;
    const [output] = this.session.outputNames;
    const tensor = new ort.Tensor("float32", images, [count, 28, 28, 1]);
    const results = await this.session.run({ [input]: tensor });
    return results[output].data;
  }

  /** The logits of one image, 28 × 28 values. Takes down how long they took. */
  async answer(image) {
    const start = performance.now();
    const logits = await this.predict(image, 1);
    this.milliseconds.push(performance.now() - start);
    this.milliseconds = this.milliseconds.slice(-REMEMBERED);
    return logits;
  }

  /** The median of the last answers' latencies in milliseconds; null before the first answer. */
  latency() {
    if (this.milliseconds.length === 0) {
      return null;
    }
    const sorted = [...this.milliseconds].sort((a, b) => a - b);
    const middle = sorted.length / 2;
    return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle) - 1]) / 2;
  }
}

/**
 * Begins to load networks, one after another.
 *
 * @param {string[]} keys - such as ["student", "teacher"], for models/student.onnx, then the next
 * @returns {Map<string, Promise<Network>>} by key. Where one fails, the others are loaded all the same.
 */
export function loadNetworks(keys) {
  const networks = new Map();
  const runtime = loadRuntime();
  let previous = runtime;
  for (const key of keys) {
    const network = loadAfter(previous, runtime, `models/${key}.onnx`);
    network.catch(() => {}); // whoever waits for it says so
    networks.set(key, network);
    previous = network;
  }
  return networks;
}

async function loadAfter(previous, runtime, url) {
  await runtime;
  await previous.catch(() => {});
  return Network.load(url);
}

/** Loads onnxruntime-web. It would compile its WebAssembly while that comes in: slower. */
async function loadRuntime() {
  try {
    await WebAssembly.compile(Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0)); // the smallest there is
  } catch {
    throw new Error("This browser does not run WebAssembly, or this page may not use it");
  }
  const wasm = await fetchFile(RUNTIME_WASM);
  try {
    ort = await import(`./${RUNTIME}`);
  } catch {
    throw new Error(`${RUNTIME} cannot be loaded`);
  }
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm;
}

/** The bytes of a file of the page's own. Throws an Error that names the file where there is none. */
export async function fetchFile(url) {
  let response;
  let content;
  try {
    response = await fetch(url);
    content = await response.arrayBuffer();
  } catch {
    throw new Error(`${url}: no answer from the server`);
  }
  if (!response.ok) {
    throw new Error(`${url}: the server says ${response.status}`);
  }
  return content;
}
