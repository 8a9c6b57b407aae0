// The page: the slide in view, what is drawn on it, light and dark.

import { $, ask, breakable, element, shortened } from "./dom.js";
import { markCurrent, markStateOf, refresh, slideOf, startList } from "./list.js";
import { request, showSlide, startReports } from "./report.js";
import { limitUploads, say, startUploads } from "./uploads.js";
import { closeSlide, openSlide, setMarks, setShown, setStrength } from "./viewer.js";

const LONGEST = 64; // characters of a name above the slide

let asked = null; // the slide that was picked last

/** Words over the place of the slide, below a picture: "glyph", "spinner" or none. */
function viewMessage(title, text = "", picture = null) {
  const parts = title ? [element("b", { textContent: title }), element("span", { textContent: text })] : [];
  if (picture) parts.unshift(element("div", { className: picture }));
  $("view-message").replaceChildren(...parts);
}

async function pick(slide) {
  asked = slide;
  markCurrent(slide.key);
  history.replaceState(null, "", `#${slide.key}`);
  showSlide(null);
  closeSlide();
  for (const name of ["tissue", "tiles"]) setLayer(name, false, true);
  $("slide-name").replaceChildren(...breakable(shortened(slide.name, LONGEST)));
  $("slide-name").title = slide.name;
  document.title = `${slide.name} · SlideScribe`;
  $("slide-facts").textContent = $("slide-warning").textContent = "";
  viewMessage("Opening the slide", "", "spinner");
  try {
    const opened = await ask(`/api/slides/${slide.key}`);
    if (asked !== slide) return;
    $("slide-facts").textContent = factsOf(opened);
    $("slide-warning").textContent = warningOf(opened);
    openSlide(opened, { onShown: () => viewMessage(""), onFailed: () => lookWhatFailed(slide) });
    showSlide(opened);
    for (const name of ["tissue", "tiles"]) setLayer(name, false, false);
  } catch (error) {
    sayItCannotBeShown(slide, error);
  }
}

function factsOf({ width, height, mpp, mpp_source }) {
  const facts = [`${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`];
  if (mpp) {
    const source = { assumed: ", assumed", objective: ", from its objective" }[mpp_source] ?? "";
    facts.push(`${(width * mpp / 1000).toFixed(1)} × ${(height * mpp / 1000).toFixed(1)} mm`, `${+mpp.toFixed(3)} µm/px${source}`);
  }
  return facts.join("  ·  ");
}

function warningOf({ mpp, stated_mpp, mpp_source }) {
  if (mpp_source === "assumed" && stated_mpp) return `States ${+stated_mpp.toPrecision(4)} µm/px, which cannot be`;
  if (mpp) return "";
  const why = stated_mpp ? `States ${+stated_mpp.toPrecision(4)} µm/px, which cannot be` : "States no resolution";
  return `${why}: no report without --assume_mpp`;
}

function sayItCannotBeShown(slide, error) {
  if (asked === slide) viewMessage("This slide cannot be shown", error.message);
  if (error.status === 404) refresh(); // it is no longer in the folder
}

/** A part of the slide could not be had: say so, or if it is the whole slide by now, why. */
async function lookWhatFailed(slide) {
  try {
    await ask(`/api/slides/${slide.key}`);
  } catch (error) {
    if (!error.status) return; // the server is gone, which is said elsewhere
    return sayItCannotBeShown(slide, error);
  }
  await refresh(); // opens it again where another file has taken its place
  if (asked !== slide || !slideOf(slide.key)) return;
  viewMessage("");
  $("slide-warning").textContent = "Parts of it cannot be read";
}

function setLayer(name, isShown, isDisabled = false) {
  $(`show-${name}`).setAttribute("aria-pressed", String(isShown));
  $(`show-${name}`).disabled = isDisabled;
  setShown(name, isShown);
}

const outlines = new Map(); // by key and version
const OUTLINES_KEPT = 16;

async function outlineOf({ key, version }) {
  const address = `/api/slides/${key}/outline?v=${version}`;
  if (!outlines.has(address)) outlines.set(address, await ask(address));
  if (outlines.size > OUTLINES_KEPT) outlines.delete(outlines.keys().next().value);
  return outlines.get(address);
}

async function toggleOutline(name) {
  const button = $(`show-${name}`);
  const slide = asked;
  if (button.getAttribute("aria-pressed") === "true") return setLayer(name, false);
  setLayer(name, true);
  button.setAttribute("aria-busy", "true");
  try {
    const outline = await outlineOf(slide);
    if (asked === slide) setMarks("outline", outline);
  } catch (error) {
    if (asked !== slide) return;
    setLayer(name, false);
    say(error.message, true);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function startControls() {
  $("theme").onclick = () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    setMarks(); // colours on the slide follow
  };
  $("write").onclick = () => request();
  for (const name of ["tissue", "tiles"]) $(`show-${name}`).onclick = () => toggleOutline(name);
  $("show-evidence").onclick = () => setLayer("evidence", $("show-evidence").getAttribute("aria-pressed") !== "true");
  $("strength").oninput = () => setStrength(Number($("strength").value));
  $("ask").onsubmit = (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question) return $("question").focus();
    $("question").value = "";
    request(question);
  };
  $("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  };
}

async function learnAbout() {
  try {
    const about = await ask("/api/about");
    $("model").textContent = about.model.split("/").slice(-2).join("/");
    $("model").title = `${about.model}: ${about.llm}, ${about.encoder}, tiles of ${about.tile_size} px at ${about.mpp} µm/px`;
    $("how").textContent = `The model looks at the tissue in tiles of ${about.tile_size} px at ${about.mpp} µm/px, then writes. The slides stay on the machine that runs this page.`;
    $("show-evidence").hidden = Boolean(about.no_evidence);
    limitUploads(about);
  } catch (error) {
    viewMessage("The page cannot be used", error.message);
  }
}

async function start() {
  startControls();
  startUploads(async (added) => {
    $("search").value = "";
    await refresh();
    pick(slideOf(added.key) ?? added);
  });
  viewMessage("Pick a slide", "or drop some anywhere on this page", "glyph");
  await learnAbout();
  startReports(markStateOf);
  await startList({
    onPick: pick,
    onGone: () => ($("slide-warning").textContent = "No longer in the folder"),
    onReplaced: async (slide) => {
      await pick(slide);
      if (asked === slide) $("slide-warning").textContent = "Another file has just taken its place";
    },
  });
  const named = slideOf(location.hash.slice(1));
  if (named) pick(named);
}

start();
