// Starts the page: fetches the data, starts the three panels, then loads the networks.

import { fetchFile } from "./models.js";
import { byId } from "./page.js";
import { startDrawing } from "./panel_draw.js";
import { startFrontier } from "./panel_frontier.js";
import { startLoss } from "./panel_loss.js";

async function main() {
  const status = byId("status");
  try {
    const data = await (await fetchFile("data.json")).json();
    const samples = data.samples.map(decodeSample);
    const loadNetworks = startDrawing(data, samples);
    startLoss(samples);
    startFrontier(data);
    await loadNetworks();
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
