// Reports and answers as cards: waiting, working, done, failed.

import { $, ask, element, sleep } from "./dom.js";
import { lookAt, setMarks, setShown } from "./viewer.js";

const POLL_MS = 400;
let current = null; // the slide that cards are about
const working = new Map(); // card -> job id

export function showSlide(slide) {
  for (const id of working.values()) ask(`/api/jobs/${id}`, { method: "DELETE" }).catch(() => {});
  working.clear();
  current = slide;
  $("cards").replaceChildren();
  $("write").hidden = false;
  $("write").disabled = !slide;
  $("report-hint").hidden = Boolean(slide);
  $("ask").hidden = true;
  $("show-evidence").disabled = true;
}

/** Write the report of the slide in view, or answer a question about it. */
export async function request(question = null) {
  const slide = current;
  const card = element("article", { className: "card", "aria-live": "polite" });
  $("cards").append(card);
  $("write").hidden = true;
  const title = question ?? "Report";
  try {
    let job = await ask("/api/jobs", { method: "POST", body: { slide: slide.key, question } });
    working.set(card, job.id);
    while (["waiting", "running"].includes(job.state)) {
      showProgress(card, title, job);
      await sleep(POLL_MS);
      if (!card.isConnected) return;
      job = await ask(`/api/jobs/${job.id}`);
    }
    if (!card.isConnected) return;
    if (job.state === "done") showResult(card, title, job, question === null);
    else if (job.state === "failed") showFailure(card, title, job.error, question);
    else remove(card, question);
  } catch (error) {
    if (card.isConnected) showFailure(card, title, error.message, question);
  } finally {
    working.delete(card);
  }
}

function remove(card, question) {
  card.remove();
  if (question === null) $("write").hidden = false;
  $("write").focus();
}

function showProgress(card, title, job) {
  if (!card.querySelector("progress")) {
    const stop = element("button", { type: "button", textContent: "Cancel" });
    stop.onclick = () => {
      stop.disabled = true;
      ask(`/api/jobs/${job.id}`, { method: "DELETE" }).catch(() => {});
    };
    const row = element("div", { className: "row" }, element("span"), stop);
    card.replaceChildren(element("h3", { textContent: title }), element("progress"), row);
  }
  const bar = card.querySelector("progress");
  if (job.done) [bar.max, bar.value] = [job.total, job.done];
  else bar.removeAttribute("value");
  const others = job.before === 1 ? "1 other before you" : `${job.before} others before you`;
  const told = job.state === "waiting" ? (job.before ? `Waiting, ${others}` : "Waiting") : job.step || "Starting";
  const text = job.total ? `${told}, ${job.done} of ${job.total}` : told;
  const where = card.querySelector(".row span");
  if (where.textContent !== text) where.textContent = text;
}

function showFailure(card, title, message, question) {
  const again = element("button", { type: "button", textContent: "Try again" });
  again.onclick = () => {
    card.remove();
    request(question);
  };
  card.className = "card bad";
  card.setAttribute("role", "alert");
  card.replaceChildren(element("h3", { textContent: title }), element("p", { textContent: message }), again);
}

function showResult(card, title, job, isReport) {
  const { result } = job;
  const lines = element("div", { className: "lines" });
  const downloads = element("div", { className: "downloads" });
  const file = (name) => `/api/jobs/${job.id}/files/${name}`;
  const overlay = link("Overlay (PNG)", file("report.png"), `${result.slides[0].slide_id}_report.png`);
  const rows = result.lines.length > 2 ? [...result.lines.slice(1), result.lines[0]] : [result.lines[1]];
  for (const line of rows) {
    const isWhole = line === result.lines[0];
    const button = element("button", { type: "button", "aria-pressed": "false", className: isWhole ? "whole" : "" });
    button.textContent = isWhole ? "Evidence for all of it" : line.text;
    button.onclick = () => {
      const wasPressed = button.getAttribute("aria-pressed") === "true";
      clearLines();
      if (wasPressed) return;
      button.setAttribute("aria-pressed", "true");
      button.after(tilesOf(line, result, file));
      showEvidence(line, result);
      overlay.href = file(`${line.name}.png`);
      overlay.download = `${result.slides[0].slide_id}_${line.name}.png`;
    };
    lines.append(button);
  }
  downloads.append(
    link("Report", file("report.txt"), `${result.slides[0].slide_id}.txt`),
    link("GeoJSON", file("evidence.geojson"), `${result.slides[0].slide_id}.geojson`), overlay,
    link("JSON", file("evidence.json"), `${result.slides[0].slide_id}_evidence.json`));
  const hint = element("p", { className: "hint", textContent: "Click on a line to see the tiles it rests on." });
  const facts = element("div", { className: "row" }, element("span", { textContent: factsOf(result) }));
  const head = isReport ? [] : [element("h3", { textContent: title })]; // the panel is headed "Report" already
  if (result.uncertain) head.push(element("p", { className: "uncertain", textContent: "Uncertain: have it read." }));
  card.replaceChildren(...head, lines, ...(isReport ? [hint] : []), facts, downloads);
  $("ask").hidden = false;
}

function factsOf(result) {
  const read = result.slides[0].coords.length;
  const tiles = read < result.num_tiles ? `${read} of ${result.num_tiles} tiles read` : `${read} tiles`;
  return `${tiles}, ${result.seconds} s`;
}

const link = (textContent, href, download) => element("a", { textContent, href, download });

function clearLines() {
  for (const pressed of document.querySelectorAll(".lines [aria-pressed=true]")) pressed.setAttribute("aria-pressed", "false");
  for (const tiles of document.querySelectorAll(".tiles")) tiles.remove();
  setMarks("evidence", null);
}

function showEvidence(line, result) {
  const slide = result.slides[0];
  const row = result.lines.indexOf(line);
  setMarks("evidence", {
    values: slide.maps[result.method][row], coords: slide.coords, width: slide.tile_width, height: slide.tile_height,
    top: line.top_tiles,
  });
  $("show-evidence").disabled = false;
  $("show-evidence").setAttribute("aria-pressed", "true");
  setShown("evidence", true);
}

function tilesOf(line, result, file) {
  const slide = result.slides[0];
  const box = element("div", { className: "tiles" });
  if (!line.top_tiles.length) {
    box.append(element("p", { textContent: "No tile speaks for this line more than the slide's mean." }));
    return box;
  }
  box.append(element("p", { textContent: "Tiles that speak for it most" }));
  for (const tile of line.top_tiles) {
    const picture = element("img", { src: file(`${line.name}_${tile.rank}.png`), alt: "" });
    const button = element("button", { type: "button", "aria-label": `Look at tile ${tile.rank}` }, picture);
    button.append(element("b", { textContent: tile.rank }));
    button.onclick = () => lookAt(tile.x, tile.y, slide.tile_width, slide.tile_height);
    box.append(button);
  }
  return box;
}
