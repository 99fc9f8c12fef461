"use strict";
// Blocks unfold and the page scrolls without this script; it adds zoom, dragging, the figures' panel and the lines of side values.
const view = document.getElementById("view");
const sheet = document.getElementById("sheet");
const graph = document.getElementById("graph");
const figures = document.getElementById("figures");
const paths = [...document.querySelectorAll("#values path")];
let scale = 1;

function zoom(wanted, x = view.clientWidth / 2, y = 0) {
  const before = scale;
  scale = Math.min(4, Math.max(0.1, wanted));
  const left = (view.scrollLeft + x) * (scale / before) - x;
  const top = (view.scrollTop + y) * (scale / before) - y;
  graph.style.transform = `scale(${scale})`;
  resize();
  view.scrollTo(left, top);
}

function resize() {
  sheet.style.width = `${graph.offsetWidth * scale}px`;
  sheet.style.height = `${graph.offsetHeight * scale}px`;
  lines();
}

function fit() {
  zoom(Math.min(1, view.clientWidth / graph.offsetWidth, view.clientHeight / graph.offsetHeight));
}

// A block in a folded run has no place that can be seen: the run stands for it.
function place(id) {
  let element = document.getElementById(id);
  for (let around = element.parentElement.closest("details"); around; around = around.parentElement.closest("details")) {
    if (!around.open) element = around;
  }
  const box = (element.matches("details") ? element.querySelector("summary") : element).getBoundingClientRect();
  const origin = graph.getBoundingClientRect();
  return { left: (box.left - origin.left) / scale, y: (box.top + box.height / 2 - origin.top) / scale };
}

function lines() {
  const lanes = new Map();
  for (const path of paths) {
    const from = place(path.dataset.from);
    const to = place(path.dataset.to);
    if (!lanes.has(path.dataset.lane)) lanes.set(path.dataset.lane, lanes.size);
    const lane = 78 - 12 * (lanes.get(path.dataset.lane) % 6);
    path.setAttribute("d", `M ${from.left} ${from.y + 4} H ${lane} V ${to.y} H ${to.left} m -7 -4 l 7 4 l -7 4`);
  }
}

function show(event) {
  const told = event.target.closest("[data-figures]");
  figures.textContent = told ? told.dataset.figures : "";
  const box = event.target.closest(".box, .input");
  for (const path of paths) path.classList.toggle("shown", box !== null && [path.dataset.from, path.dataset.to].includes(box.id));
}

const KEYS = {
  ArrowLeft: () => view.scrollBy(-60, 0),
  ArrowRight: () => view.scrollBy(60, 0),
  ArrowUp: () => view.scrollBy(0, -60),
  ArrowDown: () => view.scrollBy(0, 60),
  "+": () => zoom(scale * 1.2),
  "=": () => zoom(scale * 1.2),
  "-": () => zoom(scale / 1.2),
  0: () => zoom(1),
  f: fit,
  Escape: () => { figures.textContent = ""; },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.addEventListener("mouseover", show);
document.addEventListener("focusin", show);
document.addEventListener("toggle", resize, true);
window.addEventListener("resize", resize);

view.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const box = view.getBoundingClientRect();
  zoom(scale * (event.deltaY < 0 ? 1.1 : 1 / 1.1), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

view.addEventListener("pointerdown", (event) => {
  if (event.pointerType !== "mouse" || event.button !== 0 || event.target.closest(".box, .input")) return;
  const start = { x: view.scrollLeft + event.clientX, y: view.scrollTop + event.clientY };
  const drag = (move) => view.scrollTo(start.x - move.clientX, start.y - move.clientY);
  view.classList.add("dragged");
  view.addEventListener("pointermove", drag);
  view.setPointerCapture(event.pointerId);
  view.addEventListener("lostpointercapture", () => {
    view.classList.remove("dragged");
    view.removeEventListener("pointermove", drag);
  }, { once: true });
});

const all = (open) => { for (const box of document.querySelectorAll("#graph details")) box.open = open; };
const BUTTONS = {
  in: () => zoom(scale * 1.2),
  out: () => zoom(scale / 1.2),
  actual: () => zoom(1),
  fit,
  unfold: () => all(true),
  fold: () => all(false),
};
for (const button of document.querySelectorAll("button")) button.addEventListener("click", BUTTONS[button.id]);

resize();
