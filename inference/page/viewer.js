// The slide that can be zoomed, and what is drawn on it.
/* global OpenSeadragon */

import { $ } from "./dom.js";

const canvas = Object.assign(document.createElement("canvas"), { className: "marks" });
const shown = { tissue: false, tiles: false, evidence: true };
const OBJECTIVE_TIMES_MPP = 10; // 10x is 1 um a pixel by convention
let strength = 0.75; // of the colours of evidence: 1 hides the tissue below the strongest
let viewer = null;
let slide = null;
let whenShown = null;
let whenFailed = null;
let marks = {}; // outline: tissue and tiles; evidence: values, coords, tile sizes, top tiles

/** Show a slide; call `onShown` when there is something to see of it, `onFailed` once if a part cannot be had. */
export function openSlide(opened, { onShown, onFailed }) {
  slide = opened;
  marks = {};
  if (!viewer) start();
  [whenShown, whenFailed] = [onShown, onFailed];
  viewer.open({
    width: slide.width, height: slide.height, tileSize: slide.tile_px, tileOverlap: 1,
    minLevel: 0, maxLevel: slide.max_level,
    getTileUrl: (level, x, y) => `/api/slides/${slide.key}/zoom/${level}/${x}_${y}.jpg?v=${slide.version}`,
  });
  $("zoom").hidden = false;
}

export function closeSlide() {
  viewer?.close();
  slide = null;
  marks = {};
  whenShown = whenFailed = null;
  $("scale").hidden = $("zoom").hidden = true;
  $("navigator").classList.add("away");
  draw();
}

export function setMarks(name, value) {
  marks[name] = value;
  draw();
}

export function setShown(name, isShown) {
  shown[name] = isShown;
  draw();
}

export function setStrength(value) {
  strength = value;
  draw();
}

/** Bring a rectangle of level-0 pixels into view, with room around it. */
export function lookAt(x, y, width, height) {
  const item = viewer?.world.getItemAt(0);
  if (!item) return;
  const room = 1.2;
  viewer.viewport.fitBounds(
    item.imageToViewportRectangle(x - room * width, y - room * height, (1 + 2 * room) * width, (1 + 2 * room) * height));
}

export const lookAtAll = () => viewer?.viewport.goHome();

function start() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  viewer = OpenSeadragon({
    element: $("viewer"), showNavigationControl: false, drawer: "canvas", crossOriginPolicy: false,
    visibilityRatio: 0.5, maxZoomPixelRatio: 4, animationTime: calm ? 0 : 0.6, gestureSettingsMouse: { clickToZoom: false },
    showNavigator: true, navigatorId: "navigator",
  });
  viewer.canvas.append(canvas);
  viewer.canvas.setAttribute("role", "application");
  viewer.canvas.setAttribute("aria-label", "The slide; arrow keys move, plus and minus zoom, 0 shows all of it");
  viewer.addHandler("update-viewport", draw);
  viewer.addHandler("resize", draw);
  viewer.addHandler("open", draw);
  viewer.addHandler("tile-drawn", () => {
    whenShown?.();
    whenShown = null;
  });
  viewer.addHandler("tile-load-failed", () => {
    whenFailed?.();
    whenFailed = null;
  });
  $("zoom-in").onclick = () => viewer.viewport.zoomBy(1.6).applyConstraints();
  $("zoom-out").onclick = () => viewer.viewport.zoomBy(1 / 1.6).applyConstraints();
  $("zoom-all").onclick = lookAtAll;
  $("zoom-full").hidden = !document.fullscreenEnabled;
  $("zoom-full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("view").requestFullscreen());
}

function draw() {
  const box = $("viewer").getBoundingClientRect();
  const dense = window.devicePixelRatio || 1;
  canvas.width = box.width * dense;
  canvas.height = box.height * dense;
  canvas.style.width = `${box.width}px`;
  canvas.style.height = `${box.height}px`;
  const item = viewer?.world.getItemAt(0);
  drawLegend();
  if (!item || !slide) return;
  const isWhole = viewer.viewport.getZoom(true) < 1.4 * viewer.viewport.getHomeZoom();
  $("navigator").classList.toggle("away", isWhole); // not `hidden`: it has to know its size
  const corner = viewer.viewport.pixelFromPoint(item.imageToViewportCoordinates(0, 0), true);
  const far = viewer.viewport.pixelFromPoint(item.imageToViewportCoordinates(slide.width, 0), true);
  const scale = (far.x - corner.x) / slide.width; // screen pixels per level-0 pixel
  const pen = canvas.getContext("2d");
  pen.setTransform(scale * dense, 0, 0, scale * dense, corner.x * dense, corner.y * dense);
  if (shown.evidence && marks.evidence) drawEvidence(pen, marks.evidence, 1 / scale);
  if (shown.tiles && marks.outline) drawTiles(pen, marks.outline, 1 / scale);
  if (shown.tissue && marks.outline) drawTissue(pen, marks.outline, 1 / scale);
  drawScale(scale);
}

function drawLegend() {
  const { outline } = marks;
  const keys = {
    tissue: shown.tissue && outline && `tissue, ${(100 * outline.tissue_fraction).toFixed(1)} % of the slide`,
    tiles: shown.tiles && outline && (outline.tiles.length === 1 ? "1 tile" : `${outline.tiles.length.toLocaleString("en")} tiles`),
    evidence: shown.evidence && marks.evidence,
  };
  for (const [name, told] of Object.entries(keys)) {
    $(`key-${name}`).hidden = !told;
    if (typeof told === "string") $(`key-${name}`).querySelector("span").textContent = told;
  }
  $("key-strength").hidden = !keys.evidence;
  $("legend").hidden = !slide || !Object.values(keys).some(Boolean);
}

function drawEvidence(pen, { values, coords, width, height, top }, pixel) {
  const strongest = Math.max(...values.map(Math.abs)) || 1;
  const colors = getComputedStyle(document.documentElement);
  const [speaksFor, against] = ["--for", "--against"].map((name) => colors.getPropertyValue(name));
  pen.fillStyle = "rgb(255 255 255 / 35%)"; // the slide steps back, whose own colours are strong
  pen.fillRect(0, 0, slide.width, slide.height);
  pen.lineWidth = pixel;
  pen.strokeStyle = "rgb(60 60 75 / 45%)";
  coords.forEach(([x, y], tile) => {
    pen.globalAlpha = strength * Math.abs(values[tile]) / strongest;
    pen.fillStyle = values[tile] > 0 ? speaksFor : against;
    pen.fillRect(x, y, width, height);
    pen.globalAlpha = 1;
    pen.strokeRect(x, y, width, height);
  });
  pen.font = `600 ${14 * pixel}px system-ui, sans-serif`;
  for (const { x, y, rank } of top) {
    pen.lineWidth = 2 * pixel;
    pen.strokeStyle = "#1d1d27";
    pen.strokeRect(x, y, width, height);
    pen.lineWidth = 3 * pixel;
    pen.strokeStyle = "#ffffff";
    pen.strokeText(rank, x + 5 * pixel, y + 16 * pixel);
    pen.fillStyle = "#1d1d27";
    pen.fillText(rank, x + 5 * pixel, y + 16 * pixel);
  }
}

function drawTiles(pen, { tiles, tile_width, tile_height }, pixel) {
  pen.lineWidth = pixel;
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--tile");
  for (const [x, y] of tiles) pen.strokeRect(x, y, tile_width, tile_height);
}

function drawTissue(pen, { tissue }, pixel) {
  pen.lineWidth = 2 * pixel;
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--tissue");
  pen.beginPath();
  for (const rings of tissue)
    for (const ring of rings) {
      ring.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
    }
  pen.stroke();
}

function drawScale(scale) {
  $("scale").hidden = !slide.mpp;
  if (!slide.mpp) return;
  const longest = 140 * slide.mpp / scale; // um
  const power = 10 ** Math.floor(Math.log10(longest));
  const length = [5, 2, 1].map((step) => step * power).find((um) => um <= longest);
  $("scale-text").textContent = length >= 1000 ? `${length / 1000} mm` : `${+length.toPrecision(1)} µm`;
  $("magnification").textContent = `${+(OBJECTIVE_TIMES_MPP * scale / slide.mpp).toPrecision(2)}×`;
  $("scale").querySelector("i").style.width = `${(length / slide.mpp) * scale}px`;
}
