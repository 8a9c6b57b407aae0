// Reports and answers as cards: waiting, working, done, failed. What was asked in this tab is kept while the server has
// it: another slide may be looked at meanwhile, and the page may be loaded again.

import { $, ask, element, sleep } from "./dom.js";
import { lookAt, setMarks, setShown } from "./viewer.js";

const POLL_MS = 400;
const LOST_MS = 2000; // between tries where the server does not answer
const ETA_AFTER_MS = 3000; // of a step, before what is left of it is guessed
const HARDLY = 0.05; // a change of a line's probability by 5 % by all tiles together
const KEPT = "slidescribe requests"; // in the tab's storage: [slide key, job id, question, version] of each
let current = null; // the slide that cards are about
let requests = []; // {key, version, id, question, job, error, card}
let onChange = () => {};

const isGoingOn = (one) => !one.error && (!one.job || ["waiting", "running"].includes(one.job.state));

/** Take up what was asked before the page was loaded again; call `changed` when that of a slide changes. */
export function startReports(changed) {
  onChange = changed;
  try {
    for (const [key, id, question, version] of JSON.parse(sessionStorage.getItem(KEPT)) ?? [])
      requests.push({ key, id, question, version });
  } catch {
    requests = [];
  }
  for (const one of [...requests]) follow(one);
}

/** Of a slide: "working", "written" or null. */
export function stateOf(key) {
  const found = requests.filter((one) => one.key === key);
  if (found.some(isGoingOn)) return "working";
  return found.some((one) => one.job?.state === "done") ? "written" : null;
}

export function showSlide(slide) {
  current = slide;
  for (const one of requests) one.card = null;
  $("cards").replaceChildren();
  $("show-evidence").disabled = true;
  if (slide) for (const one of requests.filter((one) => one.key === slide.key)) draw(one);
  showControls();
}

/** Write the report of the slide in view, or answer a question about it. */
export async function request(question = null) {
  const one = { key: current.key, version: current.version, question };
  requests.push(one);
  await send(one);
}

async function send(one) {
  one.error = one.job = one.id = null;
  one.isGone = one.isGivenUp = false;
  if (one.key === current?.key) one.version = current.version; // of a second try, the file may be another
  draw(one, true);
  try {
    one.job = await ask("/api/jobs", { method: "POST", body: { slide: one.key, version: one.version, question: one.question } });
    one.id = one.job.id;
    remember();
  } catch (error) {
    one.error = error.message;
    draw(one);
    return;
  }
  await follow(one);
}

async function follow(one) {
  one.error = null;
  while (requests.includes(one)) {
    try {
      one.job = await ask(`/api/jobs/${one.id}`);
      one.isLost = false;
    } catch (error) {
      one.isLost = !error.status; // no answer at all: the report may well go on meanwhile
      one.isGone = error.status === 404;
      if (!one.isLost) one.error = error.message;
    }
    if (one.job?.state === "cancelled" || (one.isGone && !one.card)) return forget(one);
    draw(one);
    if (!isGoingOn(one)) return;
    await sleep(one.isLost ? LOST_MS : POLL_MS);
  }
}

function remember() {
  sessionStorage.setItem(KEPT, JSON.stringify(requests.filter((one) => one.id).map((one) => [one.key, one.id, one.question, one.version])));
}

function forget(one) {
  const hadFocus = one.card?.contains(document.activeElement);
  requests = requests.filter((other) => other !== one);
  one.card?.remove();
  remember();
  onChange(one.key);
  showControls();
  if (hadFocus) ($("write").hidden ? $("question") : $("write")).focus();
}

/** The button for a report, until there is one; the form for questions, as soon as there is a slide. */
function showControls() {
  const here = current ? requests.filter((one) => one.key === current.key) : [];
  $("write").disabled = !current;
  $("write").hidden = here.some((one) => one.question === null);
  $("report-hint").hidden = $("write").hidden;
  $("ask").hidden = !current;
}

function draw(one, isNew = false) {
  onChange(one.key);
  if (one.key !== current?.key) return;
  if (!one.card) {
    one.card = element("article", { className: "card" });
    $("cards").append(one.card);
  }
  const title = one.question ?? "Report";
  if (isGoingOn(one)) showProgress(one, title);
  else if (one.job?.state === "done" && !one.error) showResult(one, title);
  else showFailure(one, title);
  showControls();
  if (isNew || !isGoingOn(one)) one.card.scrollIntoView({ block: "nearest" });
}

function showProgress(one, title) {
  const { card, job } = one;
  card.className = "card";
  if (!card.querySelector("progress")) {
    const stop = element("button", { type: "button", textContent: "Cancel" });
    stop.onclick = () => {
      stop.disabled = one.isGivenUp = true;
      ask(`/api/jobs/${one.id}`, { method: "DELETE" }).catch(() => (one.isGivenUp = false)); // to be tried again
    };
    const bar = element("progress", { "aria-label": `Progress of: ${title}` });
    const row = element("div", { className: "row" }, element("span", { role: "status" }), stop);
    card.replaceChildren(element("h3", { textContent: title }), bar, row);
  }
  const [bar, where, stop] = ["progress", ".row span", "button"].map((name) => card.querySelector(name));
  if (job?.done) [bar.max, bar.value] = [job.total, job.done];
  else bar.removeAttribute("value");
  stop.disabled = !one.id || one.isGivenUp;
  const text = one.isLost ? "No answer from the server; trying again" : progressInWords(one);
  if (where.textContent !== text) where.textContent = text;
}

function progressInWords(one) {
  const { job } = one;
  if (!job) return "Sending";
  if (job.state === "waiting") {
    if (!job.before) return "Waiting";
    return `Waiting, ${job.before === 1 ? "1 other" : `${job.before} others`} before you`;
  }
  const step = job.step || "Starting";
  if (!job.total) return step;
  return `${step}, ${job.done.toLocaleString("en")} of ${job.total.toLocaleString("en")}${leftInWords(one)}`;
}

/** How long the rest of a step will take, judged by what was seen of it. */
function leftInWords(one) {
  const { step, done, total } = one.job;
  if (one.pace?.step !== step) one.pace = { step, done, since: performance.now() };
  const took = performance.now() - one.pace.since;
  if (took < ETA_AFTER_MS || done <= one.pace.done) return "";
  const left = (took / (done - one.pace.done)) * (total - done) / 1000;
  return left < 60 ? `, ${Math.ceil(left)} s left` : `, ${Math.round(left / 60)} min left`;
}

function showFailure(one, title) {
  const again = element("button", { type: "button", textContent: "Try again" });
  // Where only the way to the server broke, the report may be there: look at it before another is asked for.
  again.onclick = () => (one.id && one.error && !one.isGone ? follow(one) : send(one));
  const close = element("button", { type: "button", textContent: "Close" });
  close.onclick = () => forget(one);
  const text = element("p", { textContent: one.error ?? one.job.error });
  one.card.className = "card bad";
  one.card.replaceChildren(
    element("h3", { textContent: title }), element("div", { role: "alert" }, text),
    element("div", { className: "buttons" }, again, close));
}

function showResult(one, title) {
  const { card, job } = one;
  const { result } = job;
  const isReport = one.question === null;
  const isOfOtherFile = Boolean(one.version && one.version !== current.version);
  const file = (name) => `/api/jobs/${job.id}/files/${name}`;
  const name = result.slides[0].slide_id;
  const downloads = element("div", { className: "downloads" }, link(isReport ? "Report" : "Answer", file("report.txt"), `${name}.txt`));
  const head = isReport ? [] : [element("h3", { className: "asked", textContent: title })]; // the panel is headed "Report" already
  const warn = (textContent) => head.push(element("p", { className: "uncertain", textContent }));
  if (isOfOtherFile) warn("Of the file that was here before: another one has taken its place.");
  if (result.uncertain) warn("Uncertain: have it read.");
  if (result.unread_question_tokens) warn("The question is too long: its end was not read.");
  let lines, hint;
  if (result.no_evidence || isOfOtherFile) {
    lines = plainLines(result);
    hint = result.no_evidence;
  } else {
    const overlay = link("Overlay (PNG)", file("report.png"), `${name}_report.png`);
    lines = linesWithEvidence(result, file, overlay);
    hint = "Pick a line to see which tiles the model took it from. That does not make it right.";
    downloads.append(
      link("GeoJSON", file("evidence.geojson"), `${name}.geojson`), overlay,
      link("JSON", file("evidence.json"), `${name}_evidence.json`));
  }
  const hints = isReport && hint ? [element("p", { className: "hint", textContent: hint })] : [];
  const facts = element("p", { className: "facts", textContent: factsOf(result) });
  if (isOfOtherFile && isReport) downloads.prepend(writeAnew(one));
  downloads.prepend(...copyButton(result));
  card.className = isReport ? "card written" : "card";
  card.replaceChildren(...head, ...hints, lines, element("footer", {}, downloads, facts));
}

function writeAnew(one) {
  const button = element("button", { type: "button", className: "small", textContent: "Write anew" });
  button.onclick = () => send(one);
  return button;
}

/** A button that copies the text; none where the browser allows none, as at addresses that are not this machine's. */
function copyButton(result) {
  if (!navigator.clipboard) return [];
  const button = element("button", { type: "button", className: "small", textContent: "Copy" });
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(result.report);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    await sleep(1500);
    button.textContent = "Copy";
  };
  return [button];
}

function plainLines(result) {
  const lines = element("div", { className: "lines" });
  for (const line of result.lines.slice(1)) lines.append(element("p", { textContent: line.text }));
  return lines;
}

function linesWithEvidence(result, file, overlay) {
  const lines = element("div", { className: "lines" });
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
  return lines;
}

function factsOf(result) {
  const read = result.slides[0].coords?.length ?? result.num_tiles;
  const tiles = read < result.num_tiles ? `${read} of ${result.num_tiles} tiles read` : `${read} tiles`;
  return `${tiles}, ${result.seconds} s`;
}

const link = (textContent, href, download) => element("a", { textContent, href, download });

function clearLines() {
  for (const pressed of document.querySelectorAll(".lines [aria-pressed=true]")) pressed.setAttribute("aria-pressed", "false");
  for (const tiles of document.querySelectorAll(".tiles")) tiles.remove();
  setMarks("evidence", null);
  $("show-evidence").disabled = true;
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
  box.append(element("p", { textContent: weightInWords(line.evidence_of_all_tiles) }));
  return box;
}

/** How much the colours stand for, which every line scales anew; `total` is a natural logarithm. */
function weightInWords(total) {
  if (Math.abs(total) < HARDLY) return "It hardly rests on single tiles: the slide's mean tile alone would make it as probable.";
  const factor = Math.exp(Math.abs(total));
  const times = factor > 1000 ? "more than 1,000" : factor.toPrecision(factor < 10 ? 2 : 3).replace(/\.0$/, "");
  return `All tiles together make it ${times} times ${total > 0 ? "as" : "less"} probable ${total > 0 ? "as" : "than"} the slide's mean tile alone.`;
}
