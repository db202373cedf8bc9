// Starts the page: begins to load the networks, fetches the data, starts the three panels.

import { fetchFile, loadNetworks } from "./models.js";
import { byId, reportProblem } from "./page.js";
import { startDrawing } from "./panel_draw.js";
import { startFrontier } from "./panel_frontier.js";
import { startLoss } from "./panel_loss.js";

async function main() {
  const networks = loadNetworks(["shipped", "student", "teacher"]); // small ones answer first
  try {
    const data = await loadData();
    byId("panels").hidden = false;
    startDrawing(data, data.samples, networks);
    startLoss(data.samples);
    startFrontier(data);
    await reportNetworks(data.networks, networks);
  } catch (error) {
    reportProblem(error.message);
  }
}

/** What data.json holds. Throws an Error that names the file. */
async function loadData() {
  const content = await fetchFile("data.json");
  try {
    const data = JSON.parse(new TextDecoder().decode(content));
    return { ...data, samples: data.samples.map(decodeSample) };
  } catch {
    throw new Error("data.json does not hold what build.py writes");
  }
}

/** A sample with its pixels as 28 × 28 values from 0 to 255. In the file they are base64. */
function decodeSample(sample) {
  const bytes = atob(sample.pixels);
  return { ...sample, pixels: Uint8Array.from(bytes, (letter) => letter.charCodeAt(0)) };
}

/** Waits until all networks are loaded or have failed, and says at the top of the page which did. */
async function reportNetworks(abouts, networks) {
  const loaded = [];
  const failed = new Map(); // names, by what went wrong: the same may stop several
  for (const { key, name } of abouts) {
    try {
      await networks.get(key);
      loaded.push(name);
    } catch (error) {
      failed.set(error.message, [...(failed.get(error.message) ?? []), name]);
    }
  }

  for (const [message, names] of failed) {
    reportProblem(`Not loaded: ${names.join(", ")}. ${message}`);
  }
  if (failed.size > 0 && loaded.length > 0) {
    reportProblem(`Ready: ${loaded.join(", ")}`);
  }
  if (!byId("status").classList.contains("error")) {
    byId("status").textContent = "The networks are ready.";
  }
}

main();
