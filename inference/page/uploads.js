// Slides that are added on the page, one after another.

import { $, bytesInWords, element } from "./dom.js";

let limits = { upload_suffixes: [], max_upload: 0 };
let onAdded = async () => {};
const waiting = [];
let isSending = false;

/** Take files that are chosen or dropped; call `added` with each slide that was taken. */
export function startUploads(added) {
  onAdded = added;
  startDrops();
  $("file").onchange = () => {
    addAll([...$("file").files]);
    $("file").value = "";
  };
}

export function limitUploads(about) {
  limits = about;
  $("file").accept = about.upload_suffixes.join(",");
}

/** Say one line below the list, until it is closed. */
export function say(text, isBad = false) {
  const line = element("div", { className: isBad ? "card bad" : "card" }, element("p", { textContent: text }));
  const close = element("button", { type: "button", textContent: "Close" });
  close.onclick = () => line.remove();
  line.append(close);
  $("uploads").append(line);
  line.scrollIntoView({ block: "nearest" });
}

async function addAll(files) {
  for (const line of $("uploads").querySelectorAll(".bad")) line.remove(); // of what was tried before
  waiting.push(...files);
  if (isSending) return;
  isSending = true;
  while (waiting.length) await add(waiting.shift());
  isSending = false;
}

async function add(file) {
  const suffix = file.name.includes(".") ? file.name.slice(file.name.lastIndexOf(".")).toLowerCase() : "";
  if (!limits.upload_suffixes.includes(suffix))
    return say(`${file.name} is no slide of one file (${limits.upload_suffixes.join(" ")}).`, true);
  if (file.size > limits.max_upload)
    return say(`${file.name} has ${bytesInWords(file.size)}, more than the ${bytesInWords(limits.max_upload)} allowed.`, true);
  const bar = element("progress", { max: 1, value: 0, "aria-label": `Adding ${file.name}` });
  const stop = element("button", { type: "button", textContent: "Cancel" });
  const where = element("span");
  const card = element(
    "div", { className: "card" }, element("h3", { textContent: `Adding ${file.name}` }), bar,
    element("div", { className: "row" }, where, stop));
  $("uploads").append(card);
  const taken = await send(file, stop, (sent) => {
    if (sent < 1) bar.value = sent;
    else bar.removeAttribute("value");
    where.textContent = (sent < 1 ? `${Math.floor(100 * sent)} %` : "Checking") + (waiting.length ? `, ${waiting.length} more to come` : "");
  });
  card.remove();
  if (taken) await onAdded(taken);
}

/** Send a file; resolves to the slide that it became, or null where it was given up or refused. */
function send(file, stop, onProgress) {
  return new Promise((resolve) => {
    const sending = new XMLHttpRequest(); // fetch cannot say how much was sent
    const end = (slide, bad = null) => {
      if (bad) say(bad, true);
      resolve(slide);
    };
    stop.onclick = () => sending.abort();
    sending.open("PUT", `/api/uploads/${encodeURIComponent(file.name)}`);
    sending.setRequestHeader("X-SlideScribe", "page");
    sending.responseType = "json";
    sending.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    sending.onabort = () => end(null);
    sending.onerror = () => end(null, `${file.name} was not taken; the connection broke.`);
    sending.onload = () => {
      if (sending.status === 201) end(sending.response);
      else end(null, sending.response?.error ?? `${file.name} was refused (${sending.status}).`);
    };
    sending.send(file);
  });
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
    addAll([...event.dataTransfer.files]);
  });
}
