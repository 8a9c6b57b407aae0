// The list of slides. It follows the folder: looked at every few seconds while the page is seen, and when it is
// returned to; a row is made anew only where its file is another.

import { $, ask, breakable, bytesInWords, element, shortened, sleep } from "./dom.js";
import { stateOf } from "./report.js";

const POLL_MS = 4000;
const PATIENCE = 20; // times as long as the folder took to look through, where that is much
const LONGEST = 40; // characters of a name in the list
const STATES = { working: "writing …", written: "reported" };

let slides = [];
let rows = new Map(); // of slides by key: {version, item}
let current = null; // key of the slide that was picked last
let told = { onPick() {}, onGone() {}, onReplaced() {} };
let isLooking = null; // a look at the folder under way

/** List the folder and go on following it; `told` hears of slides picked, taken away and replaced. */
export async function startList(callbacks) {
  told = callbacks;
  $("search").oninput = drawList;
  $("slides").onkeydown = walkList;
  $("refresh").onclick = async () => {
    $("refresh").classList.add("turning");
    await Promise.all([refresh(), sleep(400)]); // long enough to be seen
    $("refresh").classList.remove("turning");
  };
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  addEventListener("focus", () => refresh());
  await refresh();
  followFolder();
}

async function followFolder() {
  for (;;) {
    const began = performance.now();
    if (!document.hidden) await refresh();
    await sleep(Math.max(POLL_MS, PATIENCE * (performance.now() - began)));
  }
}

/** Look at the folder; who asks while somebody looks gets the same. */
export function refresh() {
  isLooking ??= look().finally(() => (isLooking = null));
  return isLooking;
}

async function look() {
  let found;
  try {
    found = await ask("/api/slides");
  } catch (error) {
    $("offline").hidden = false;
    $("offline").textContent = `${error.message} Trying again.`;
    return;
  }
  $("offline").hidden = true;
  const before = slides.find((slide) => slide.key === current);
  slides = found;
  drawList();
  const now = slides.find((slide) => slide.key === current);
  if (before && !now) told.onGone(before);
  else if (before && now.version !== before.version) told.onReplaced(now);
}

export const slideOf = (key) => slides.find((slide) => slide.key === key);

function drawList() {
  const words = $("search").value.trim().toLowerCase();
  const found = slides.filter((slide) => slide.name.toLowerCase().includes(words));
  $("count").textContent = found.length === slides.length ? slides.length || "" : `${found.length} of ${slides.length}`;
  const known = rows;
  rows = new Map();
  for (const slide of slides) {
    const row = known.get(slide.key);
    rows.set(slide.key, row?.version === slide.version ? row : { version: slide.version, item: listed(slide) });
  }
  const items = found.map((slide) => rows.get(slide.key).item);
  if (!slides.length) items.push(emptyRow("The folder holds no slides yet. Copy some into it, or add one below."));
  else if (!found.length) items.push(emptyRow("No slide has this in its name."));
  replaceRows($("slides"), items);
  const [stop, open, first] = ['.slide[tabindex="0"]', ".slide[aria-current]", ".slide"].map((what) => $("slides").querySelector(what));
  letTabStopAt(stop ?? open ?? first);
}

const emptyRow = (textContent) => element("li", { className: "empty", textContent });

/** Make `items` the children of a list and leave those that stay where they are, with focus and scrolling. */
function replaceRows(list, items) {
  const wanted = new Set(items);
  for (const child of [...list.children]) if (!wanted.has(child)) child.remove();
  let next = list.firstElementChild;
  for (const item of items) {
    if (item === next) next = next.nextElementSibling;
    else list.insertBefore(item, next);
  }
}

/** One stop of the tab key for the whole list, however long; arrow keys go through it. */
function letTabStopAt(here) {
  for (const button of document.querySelectorAll('.slide[tabindex="0"]')) button.tabIndex = -1;
  if (here) here.tabIndex = 0;
}

function listed(slide) {
  const picture = element("img", { src: `/api/slides/${slide.key}/thumbnail.jpg?v=${slide.version}`, alt: "", loading: "lazy", fetchPriority: "low" });
  picture.onerror = () => picture.replaceWith(element("span", { className: "blank", textContent: "!", title: "no picture of it can be had" }));
  const cut = slide.name.lastIndexOf("/") + 1;
  const facts = element("small", { textContent: bytesInWords(slide.num_bytes) });
  const folder = cut ? element("small", { className: "folder", textContent: slide.name.slice(0, cut) }) : null;
  const words = element("span", {}, folder, element("b", {}, ...breakable(shortened(slide.name.slice(cut), LONGEST))), facts);
  const button = element("button", { type: "button", className: "slide", title: slide.name, tabIndex: -1 }, picture, words);
  button.dataset.key = slide.key;
  if (slide.key === current) button.setAttribute("aria-current", "true");
  button.onclick = () => told.onPick(slide);
  markState(button, facts);
  return element("li", {}, button);
}

/** Say in the list how far the report of a slide is. */
export function markState(button, facts = button.querySelector("small:last-child")) {
  const state = stateOf(button.dataset.key) ?? "";
  if ((facts.dataset.state ?? "") === state) return;
  facts.dataset.state = state;
  facts.querySelector("em")?.remove();
  if (state) facts.append(element("em", { textContent: ` ${STATES[state]}` }));
}

export function markStateOf(key) {
  const button = rows.get(key)?.item.querySelector(".slide");
  if (button) markState(button);
}

/** Show in the list which slide is looked at. */
export function markCurrent(key) {
  current = key;
  for (const button of document.querySelectorAll(".slide[aria-current]")) button.removeAttribute("aria-current");
  const button = rows.get(key)?.item.querySelector(".slide");
  if (!button) return;
  button.setAttribute("aria-current", "true");
  if (!button.isConnected) return; // the search leaves it out
  letTabStopAt(button);
  button.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function walkList(event) {
  const buttons = [...$("slides").querySelectorAll(".slide")];
  const here = buttons.indexOf(document.activeElement);
  const places = { ArrowDown: here + 1, ArrowRight: here + 1, ArrowUp: here - 1, ArrowLeft: here - 1, Home: 0, End: buttons.length - 1 };
  const next = buttons[places[event.key]];
  if (here < 0 || !next) return;
  event.preventDefault();
  letTabStopAt(next);
  next.focus();
}
