// Starts the page: begins to load the networks, fetches the data, starts the three panels.

import { fetchFile, loadNetworks } from "./models.js";
import { byId } from "./page.js";
import { startDrawing } from "./panel_draw.js";
import { startFrontier } from "./panel_frontier.js";
import { startLoss } from "./panel_loss.js";

async function main() {
  const status = byId("status");
  const networks = loadNetworks(["shipped", "student", "teacher"]); // small ones answer first
  try {
    const data = await (await fetchFile("data.json")).json();
    const samples = data.samples.map(decodeSample);
    startDrawing(data, samples, networks);
    startLoss(samples);
    startFrontier(data);
    await Promise.all(networks.values());
    status.textContent = "The networks are ready.";
  } catch (error) {
    status.classList.add("error");
    status.textContent = `The networks could not be loaded. ${error.message}.`;
  }
}

/** A sample with its pixels as 28 × 28 values from 0 to 255. In the file they are base64. */
function decodeSample(sample) {
  const bytes = atob(sample.pixels);
  return { ...sample, pixels: Uint8Array.from(bytes, (letter) => letter.charCodeAt(0)) };
}

main();
