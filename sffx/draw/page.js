"use strict";

// Blocks unfold and the page scrolls without this script. It adds zoom, dragging, the panel of
// figures, and the lines of values that cross a cut.
const view = document.getElementById("view");
const sheet = document.getElementById("sheet");
const graph = document.getElementById("graph");
const figures = document.getElementById("figures");
const paths = [...document.querySelectorAll("#values path")];
let scale = 1;

// Zoom about a point of the view, which stays where it is.
function zoom(wanted, x = view.clientWidth / 2, y = 0) {
  const before = scale;
  scale = Math.min(4, Math.max(0.1, wanted));
  const left = (view.scrollLeft + x) * (scale / before) - x;
  const top = (view.scrollTop + y) * (scale / before) - y;
  graph.style.transform = `scale(${scale})`;
  resize();
  view.scrollTo(left, top);
}

// A transform leaves the room of an element as it was, so the sheet takes the room of the graph.
function resize() {
  sheet.style.width = `${graph.offsetWidth * scale}px`;
  sheet.style.height = `${graph.offsetHeight * scale}px`;
  drawLines();
}

function fit() {
  const wide = view.clientWidth / graph.offsetWidth;
  const high = view.clientHeight / graph.offsetHeight;
  zoom(Math.min(1, wide, high));
}

// A block in a folded run cannot be seen: the outermost folded run around it stands for it.
function visible(id) {
  const element = document.getElementById(id);
  let shown = element;
  let around = element.parentElement.closest("details");
  while (around) {
    if (!around.open) shown = around;
    around = around.parentElement.closest("details");
  }
  return shown.matches("details") ? shown.querySelector("summary") : shown;
}

function place(id) {
  const box = visible(id).getBoundingClientRect();
  const origin = graph.getBoundingClientRect();
  return {
    left: (box.left - origin.left) / scale,
    y: (box.top + box.height / 2 - origin.top) / scale,
  };
}

// Each lane runs outside of the shorter ones beside it, so that the skips of a U-Net do not cross.
function slotsOf(spans) {
  const slots = new Map();
  const length = ([, span]) => span.bottom - span.top;
  const shortestFirst = [...spans].sort((a, b) => length(a) - length(b));
  for (const [lane, span] of shortestFirst) {
    const isBeside = ([other]) =>
      spans.get(other).top <= span.bottom && span.top <= spans.get(other).bottom;
    const inside = [...slots].filter(isBeside).map(([, slot]) => slot);
    slots.set(lane, 1 + Math.max(-1, ...inside));
  }
  return slots;
}

function drawLines() {
  const courses = paths.map((path) => ({
    path,
    lane: path.dataset.lane,
    from: place(path.dataset.from),
    to: place(path.dataset.to),
  }));
  const spans = new Map();
  for (const { lane, from, to } of courses) {
    const span = spans.get(lane) ?? { top: from.y, bottom: to.y };
    spans.set(lane, { top: Math.min(span.top, from.y), bottom: Math.max(span.bottom, to.y) });
  }
  const slots = slotsOf(spans);
  // In a narrow window there is less room for the lanes at the left.
  const room = parseFloat(getComputedStyle(graph).paddingLeft);
  const outermost = Math.max(-1, ...slots.values());
  const step = Math.min(room > 60 ? 12 : 5, room / (outermost + 2));
  for (const { path, lane, from, to } of courses) {
    const x = room - step * (slots.get(lane) + 1);
    const course = `M ${from.left} ${from.y + 4} H ${x} V ${to.y} H ${to.left}`;
    path.setAttribute("d", `${course} m -7 -4 l 7 4 l -7 4`);
  }
}

function show(event) {
  const owner = event.target.closest("[data-figures]");
  figures.textContent = owner ? owner.dataset.figures : "";
  const box = event.target.closest(".box, .input");
  for (const path of paths) {
    const ends = [path.dataset.from, path.dataset.to];
    path.classList.toggle("shown", box !== null && ends.includes(box.id));
  }
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
  const factor = event.deltaY < 0 ? 1.1 : 1 / 1.1;
  zoom(scale * factor, event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

// The scrollbars belong to the view, but browsers tell no end of a press on them.
function isOnScrollbar(event) {
  const box = view.getBoundingClientRect();
  const isRight = event.clientX - box.left >= view.clientLeft + view.clientWidth;
  return isRight || event.clientY - box.top >= view.clientTop + view.clientHeight;
}

view.addEventListener("pointerdown", (event) => {
  const isOnBox = event.target.closest(".box, .input") !== null;
  if (event.pointerType !== "mouse" || event.button !== 0) return;
  if (isOnBox || isOnScrollbar(event)) return;
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

function openAll(open) {
  for (const box of document.querySelectorAll("#graph details")) box.open = open;
}

const BUTTONS = {
  in: () => zoom(scale * 1.2),
  out: () => zoom(scale / 1.2),
  actual: () => zoom(1),
  fit,
  unfold: () => openAll(true),
  fold: () => openAll(false),
};
for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", BUTTONS[button.id]);
}

resize();
