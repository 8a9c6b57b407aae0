// The page: its list of slides, the slide in view, what is added, light and dark.

import { $, ask, bytesInWords, element } from "./dom.js";
import { request, showSlide, startReports, stateOf } from "./report.js";
import { closeSlide, openSlide, setMarks, setShown } from "./viewer.js";

let slides = [];
let about = { upload_suffixes: [], max_upload: 0 };
let asked = null; // key of the slide that was picked last

/** Words over the place of the slide, below a picture: "glyph", "spinner" or none. */
function viewMessage(title, text = "", picture = null) {
  const parts = title ? [element("b", { textContent: title }), element("span", { textContent: text })] : [];
  if (picture) parts.unshift(element("div", { className: picture }));
  $("view-message").replaceChildren(...parts);
}

async function listSlides() {
  try {
    slides = await ask("/api/slides");
  } catch (error) {
    $("slides").replaceChildren(element("li", { className: "empty", textContent: error.message }));
    return;
  }
  drawList();
}

function drawList() {
  const words = $("search").value.trim().toLowerCase();
  const found = slides.filter((slide) => slide.name.toLowerCase().includes(words));
  $("count").textContent = slides.length || "";
  $("slides").replaceChildren(...found.map(listed));
  if (!slides.length) $("slides").append(element("li", { className: "empty", textContent: "The folder holds no slides yet. Add one below." }));
  else if (!found.length) $("slides").append(element("li", { className: "empty", textContent: "No slide has this in its name." }));
  letTabStopAt(document.querySelector(".slide[aria-current]") ?? document.querySelector(".slide"));
}

/** One stop of the tab key for the whole list, however long; arrow keys go through it. */
function letTabStopAt(here) {
  for (const button of document.querySelectorAll(".slide")) button.tabIndex = button === here ? 0 : -1;
}

function listed(slide) {
  const picture = element("img", { src: `/api/slides/${slide.key}/thumbnail.jpg`, alt: "", loading: "lazy" });
  picture.onerror = () => picture.replaceWith(element("span", { className: "blank", textContent: "!", "aria-hidden": "true" }));
  const facts = element("small", { textContent: bytesInWords(slide.num_bytes) });
  const words = element("span", {}, element("b", {}, ...breakable(slide.name)), facts);
  const button = element("button", { type: "button", className: "slide", title: slide.name }, picture, words);
  button.dataset.key = slide.key;
  if (slide.key === asked) button.setAttribute("aria-current", "true");
  button.onclick = () => pick(slide);
  markState(button, facts);
  return element("li", {}, button);
}

/** A file name that lines may break behind its marks, not amid a word. */
function breakable(name) {
  return name.split(/(?<=[_/-])/).flatMap((part) => [part, element("wbr")]);
}

const STATES = { working: "writing …", written: "reported" };

/** Say in the list how far the report of a slide is. */
function markState(button, facts = button.querySelector("small")) {
  const state = stateOf(button.dataset.key) ?? "";
  if ((facts.dataset.state ?? "") === state) return;
  facts.dataset.state = state;
  facts.querySelector("em")?.remove();
  if (state) facts.append(element("em", { textContent: ` ${STATES[state]}` }));
}

async function pick(slide) {
  asked = slide.key;
  for (const button of document.querySelectorAll(".slide")) {
    if (button.dataset.key === asked) {
      button.setAttribute("aria-current", "true");
      letTabStopAt(button);
      button.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else button.removeAttribute("aria-current");
  }
  history.replaceState(null, "", `#${slide.key}`);
  showSlide(null);
  closeSlide();
  for (const name of ["tissue", "tiles"]) setLayer(name, false, true);
  $("slide-name").textContent = slide.name;
  $("slide-facts").textContent = "";
  viewMessage("Opening the slide", "", "spinner");
  try {
    const opened = await ask(`/api/slides/${slide.key}`);
    if (asked !== slide.key) return;
    const size = opened.mpp ? `${(opened.width * opened.mpp / 1000).toFixed(1)} × ${(opened.height * opened.mpp / 1000).toFixed(1)} mm` : "";
    const facts = [`${opened.width.toLocaleString("en")} × ${opened.height.toLocaleString("en")} px`, size,
      opened.mpp ? `${+opened.mpp.toFixed(3)} µm/px` : "no resolution stated"];
    $("slide-facts").textContent = facts.filter(Boolean).join("  ·  ");
    openSlide(opened, { onShown: () => viewMessage(""), onFailed: () => lookWhatFailed(slide) });
    showSlide(opened);
    for (const name of ["tissue", "tiles"]) setLayer(name, false, false);
  } catch (error) {
    sayItCannotBeShown(slide, error);
  }
}

function sayItCannotBeShown(slide, error) {
  if (asked === slide.key) viewMessage("This slide cannot be shown", error.message);
  if (error.status === 404) listSlides(); // it is no longer in the folder
}

/** A part of the slide could not be had: say so, or if it is the whole slide by now, why. */
async function lookWhatFailed(slide) {
  try {
    await ask(`/api/slides/${slide.key}`);
  } catch (error) {
    return sayItCannotBeShown(slide, error);
  }
  if (asked !== slide.key) return;
  viewMessage("");
  $("slide-facts").textContent += "  ·  parts of it cannot be read";
}

function walkList(event) {
  const buttons = [...document.querySelectorAll(".slide")];
  const here = buttons.indexOf(document.activeElement);
  const places = { ArrowDown: here + 1, ArrowRight: here + 1, ArrowUp: here - 1, ArrowLeft: here - 1, Home: 0, End: buttons.length - 1 };
  const next = buttons[places[event.key]];
  if (here < 0 || !next) return;
  event.preventDefault();
  letTabStopAt(next);
  next.focus();
}

function setLayer(name, isShown, isDisabled = false) {
  $(`show-${name}`).setAttribute("aria-pressed", String(isShown));
  $(`show-${name}`).disabled = isDisabled;
  setShown(name, isShown);
}

const outlines = new Map();

async function toggleOutline(name) {
  const button = $(`show-${name}`);
  const key = asked;
  if (button.getAttribute("aria-pressed") === "true") return setLayer(name, false);
  setLayer(name, true);
  button.setAttribute("aria-busy", "true");
  try {
    if (!outlines.has(key)) outlines.set(key, await ask(`/api/slides/${key}/outline`));
    if (asked !== key) return;
    setMarks("outline", outlines.get(key));
  } catch (error) {
    if (asked !== key) return;
    setLayer(name, false);
    say(error.message, true);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function say(text, isBad = false) {
  const line = element("div", { className: isBad ? "card bad" : "card" }, element("p", { textContent: text }));
  const close = element("button", { type: "button", textContent: "Close" });
  close.onclick = () => line.remove();
  line.append(close);
  $("uploads").replaceChildren(line);
}

function add(file) {
  const suffix = file.name.includes(".") ? file.name.slice(file.name.lastIndexOf(".")).toLowerCase() : "";
  if (!about.upload_suffixes.includes(suffix))
    return say(`${file.name} is no slide of one file (${about.upload_suffixes.join(" ")}).`, true);
  if (file.size > about.max_upload)
    return say(`${file.name} has ${bytesInWords(file.size)}, more than the ${bytesInWords(about.max_upload)} allowed.`, true);
  const bar = element("progress", { max: 1, value: 0 });
  const stop = element("button", { type: "button", textContent: "Cancel" });
  $("uploads").replaceChildren(
    element("div", { className: "card" }, element("h3", { textContent: `Adding ${file.name}` }), bar, element("div", { className: "row" }, element("span"), stop)));
  const sending = new XMLHttpRequest(); // fetch cannot say how much was sent
  stop.onclick = () => {
    sending.abort();
    $("uploads").replaceChildren();
  };
  sending.open("PUT", `/api/uploads/${encodeURIComponent(file.name)}`);
  sending.setRequestHeader("X-SlideScribe", "page");
  sending.responseType = "json";
  sending.upload.onprogress = (event) => {
    bar.value = event.loaded / event.total;
    if (event.loaded === event.total) bar.removeAttribute("value");
  };
  sending.onerror = () => say(`${file.name} was not taken; the connection broke.`, true);
  sending.onload = async () => {
    if (sending.status !== 201) return say(sending.response?.error ?? `Refused (${sending.status}).`, true);
    $("uploads").replaceChildren();
    $("search").value = "";
    await listSlides();
    pick(sending.response);
  };
  sending.send(file);
}

function startDrops() {
  let depth = 0; // dragenter and dragleave also come from what lies inside
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  const cover = (change) => {
    depth = Math.max(0, depth + change);
    $("drop").hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => isFile(event) && cover(1));
  addEventListener("dragleave", (event) => isFile(event) && cover(-1));
  addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    cover(-depth);
    const files = [...event.dataTransfer.files];
    if (files.length === 1) add(files[0]);
    else say("Drop one slide at a time.", true);
  });
  $("file").onchange = () => {
    if ($("file").files.length) add($("file").files[0]);
    $("file").value = "";
  };
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  $("theme").onclick = () => {
    localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
    setMarks(); // colours on the slide follow
  };
  apply();
}

async function start() {
  startTheme();
  startDrops();
  viewMessage("Pick a slide", "or drop one anywhere on this page", "glyph");
  $("search").oninput = drawList;
  $("slides").onkeydown = walkList;
  $("write").onclick = () => request();
  for (const name of ["tissue", "tiles"]) $(`show-${name}`).onclick = () => toggleOutline(name);
  $("show-evidence").onclick = () => setLayer("evidence", $("show-evidence").getAttribute("aria-pressed") !== "true");
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
  try {
    about = await ask("/api/about");
    $("model").textContent = about.model.split("/").slice(-2).join("/");
    $("model").title = `${about.model}: ${about.llm}, ${about.encoder}, tiles of ${about.tile_size} px at ${about.mpp} µm/px`;
    $("show-evidence").hidden = Boolean(about.no_evidence);
    $("file").accept = about.upload_suffixes.join(",");
  } catch (error) {
    viewMessage("The page cannot be used", error.message);
  }
  startReports((key) => {
    const button = document.querySelector(`.slide[data-key="${key}"]`);
    if (button) markState(button);
  });
  await listSlides();
  const named = slides.find((slide) => `#${slide.key}` === location.hash);
  if (named) pick(named);
}

start();
