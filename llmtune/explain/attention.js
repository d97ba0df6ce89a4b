"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const EDGES = 600, TALLEST = 1100, SMALLEST = 12; // edges of a picture; pixels of a map and of its cells
const state = { kind: 0, side: "", layer: 0, head: "mean", row: -1, column: -1 };
const isRun = data.sides.length > 1;
const kindNow = () => data.kinds[state.kind];

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

// Numbers

const unpacked = new Map();
function weightsOf(kind, side, layer, head) {
  if (side === "difference") {
    const base = weightsOf(kind, "base", layer, head), tuned = weightsOf(kind, "tuned", layer, head);
    return base && tuned ? tuned.map((weight, i) => weight - base[i]) : null;
  }
  const key = `${side}/${layer}/${head}`, whole = `${kind.name}/${key}`;
  if (unpacked.has(whole)) return unpacked.get(whole);
  if (!(key in kind.values)) return null;
  const bytes = atob(kind.values[key]), wide = kind.columns.length, found = new Float32Array(kind.rows.length * wide);
  for (let row = 0, i = 0; row < kind.rows.length; row++) {
    const end = kind.masked ? row + 1 : wide; // what a row cannot see is not written
    for (let column = 0; column < end; column++, i++) {
      found[row * wide + column] = (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) / data.full;
    }
  }
  if (unpacked.size * found.length > 5e7) unpacked.clear();
  unpacked.set(whole, found);
  return found;
}

const largest = (weights) => weights.reduce((most, weight) => Math.max(most, Math.abs(weight)), 1e-6);
function shown(weight, side) {
  const digits = weight === 0 || Math.abs(weight) >= 0.01 ? weight.toFixed(3) : weight.toPrecision(2);
  return (side === "difference" && weight > 0 ? "+" : "") + digits.replace("-", "−");
}

// Colours

function table(stops) {
  const parts = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (parts.length - 1), low = Math.min(Math.floor(place), parts.length - 2);
    return parts[low].map((part, k) => Math.round(part + (place - low) * (parts[low + 1][k] - part)));
  });
}
const colours = { weight: table(data.colours.weight), difference: table(data.colours.difference) };

function colour(weight, most, side) {
  const size = Math.sqrt(Math.min(1, Math.abs(weight) / most)); // as in the PNG: small ones are seen, too
  return side === "difference" ? colours.difference[Math.round(127.5 + 127.5 * Math.sign(weight) * size)] : colours.weight[Math.round(255 * size)];
}

function paint(kind, weights, side, most) {
  const wide = kind.columns.length, tall = kind.rows.length;
  const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: tall });
  const context = canvas.getContext("2d"), picture = context.createImageData(wide, tall);
  weights.forEach((weight, i) => {
    if (kind.masked && i % wide > Math.floor(i / wide)) return; // left clear
    picture.data.set([...colour(weight, most, side), 255], 4 * i);
  });
  context.putImageData(picture, 0, 0);
  return canvas;
}

// Words

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`;
const longest = (tokens) => Math.ceil(Math.max(...tokens.map((token) => ruler.measureText(token.text).width))) + 8;

function addWord(parent, token, place, extra) {
  const word = make("text", { ...place, ...extra, class: `word ${token.special ? "special" : ""}` }, parent, token.text);
  make("title", {}, word, token.whole);
  return word;
}

// Heatmaps

const sidesShown = () => (state.side === "all" ? ["base", "tuned", "difference"] : [state.side]);
const nameOf = (side) => (side === "difference" ? "difference: tuned − base" : side === "model" ? "" : side);

function drawMaps() {
  const kind = kindNow();
  $("maps").replaceChildren();
  $("legend").replaceChildren();
  for (const side of sidesShown()) {
    const weights = weightsOf(kind, side, state.layer, state.head);
    if (!weights) continue;
    const most = largest(weights), figure = document.createElement("figure"), box = document.createElement("div");
    if (nameOf(side)) figure.append(Object.assign(document.createElement("figcaption"), { textContent: nameOf(side) }));
    box.className = "scroll";
    box.append(drawMap(kind, weights, side, most));
    figure.append(box);
    $("maps").append(figure);
    addLegend(side, most);
  }
}

function drawMap(kind, weights, side, most) {
  const wide = kind.columns.length, tall = kind.rows.length, size = Math.max(wide, tall);
  const left = longest(kind.rows), top = longest(kind.columns), beside = sidesShown().length;
  const fits = Math.floor((($("maps").clientWidth - 26 * (beside - 1)) / beside - left - 18) / wide);
  const wanted = fits >= SMALLEST ? fits : Math.max(SMALLEST, Math.floor(760 / size));
  const cell = Math.max(2, Math.min(28, Math.floor(TALLEST / size), wanted));
  const every = Math.ceil(13 / cell);
  const width = left + wide * cell + 16, height = top + tall * cell + 2;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0, role: "img" });
  svg.setAttribute("aria-label", `${kind.title}. ${$("told").textContent}`);
  const area = { x: left, y: top, width: wide * cell, height: tall * cell };
  make("rect", { ...area, class: "frame" }, svg);
  const picture = paint(kind, weights, side, most).toDataURL();
  make("image", { ...area, href: picture, preserveAspectRatio: "none" }, svg);
  const rows = [], columns = [];
  for (let i = 0; i < tall; i += every) {
    const place = { x: left - 5, y: top + (i + 0.5) * cell + 4, "text-anchor": "end" };
    rows[i] = addWord(svg, kind.rows[i], place, {});
  }
  for (let k = 0; k < wide; k += every) {
    const turn = `translate(${left + (k + 0.5) * cell + 4} ${top - 5}) rotate(-90)`;
    columns[k] = addWord(svg, kind.columns[k], { transform: turn }, {});
  }
  const mark = make("rect", { class: "cell", width: cell, height: cell, visibility: "hidden" }, svg);
  svg.showCell = () => {
    const on = state.row >= 0 && state.row < tall && state.column < wide;
    mark.setAttribute("visibility", on ? "visible" : "hidden");
    mark.setAttribute("x", left + state.column * cell);
    mark.setAttribute("y", top + state.row * cell);
    rows.forEach((word, i) => word.classList.toggle("on", on && i === state.row));
    columns.forEach((word, k) => word.classList.toggle("on", on && k === state.column));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / cell);
    const row = Math.floor((event.clientY - box.top - top) / cell);
    if (row >= 0 && row < tall && column >= 0 && column < wide) point(row, column);
  });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key], within = (at, most) => Math.max(0, Math.min(most - 1, at));
    point(within(Math.max(0, state.row) + down, tall), within(Math.max(0, state.column) + right, wide));
  });
  return svg;
}

function point(row, column) {
  Object.assign(state, { row, column });
  for (const svg of document.querySelectorAll("#maps svg")) svg.showCell();
  const kind = kindNow(), words = [kind.rows[row], kind.columns[column]].map((token) => {
    return Object.assign(document.createElement("bdi"), { textContent: token.whole });
  });
  const told = (isRun ? ["base", "tuned", "difference"] : ["model"]).map((side) => {
    const weight = weightsOf(kind, side, state.layer, state.head)[row * kind.columns.length + column];
    return `${side === "model" ? "" : `${side} `}${shown(weight, side)}`;
  });
  const unseen = kind.masked && column > row ? " (hidden: it comes later)" : "";
  $("value").replaceChildren(words[0], " looks at ", words[1], `: ${told.join(", ")}${unseen}`);
}

function addLegend(side, most) {
  const part = document.createElement("span"), bar = document.createElement("i");
  const stops = side === "difference" ? data.colours.difference : data.colours.weight;
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const [low, high] = side === "difference" ? [shown(-most, side), shown(most, side)] : ["0", most.toFixed(3)];
  part.append(isRun ? `${side}: ` : "", low, bar, high);
  $("legend").append(part);
}

// Graph

function drawGraphs() {
  const kind = kindNow(), threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(3);
  $("graphs").replaceChildren();
  for (const side of sidesShown()) {
    const edges = edgesOf(kind, side, threshold);
    const figure = document.createElement("figure"), box = document.createElement("div");
    if (nameOf(side)) figure.append(Object.assign(document.createElement("figcaption"), { textContent: nameOf(side) }));
    box.className = "scroll";
    box.append(kind.same ? drawArcs(kind, side, edges) : drawCrossing(kind, side, edges));
    figure.append(box);
    $("graphs").append(figure);
  }
  const ways = kind.masked ? "Arcs lead back to the words that are looked at"
    : kind.same ? "Arcs on the left lead back to earlier words, those on the right on to later ones"
    : "Lines lead from the words of the decoder to those that the encoder read";
  $("special-told").textContent = kind.same ? "to special tokens and the first one, too" : "to special tokens, too";
  $("graph-told").textContent = `${ways}; wider is stronger. Point at a word to see its own alone, both ways.`;
}

const isParked = (kind, column) => kind.columns[column].special || (kind.same && column === 0);

function edgesOf(kind, side, threshold) {
  const wide = kind.columns.length, found = [];
  const sides = side === "difference" ? ["base", "tuned"] : [side];
  const parts = sides.map((name) => weightsOf(kind, name, state.layer, state.head));
  if (parts.some((part) => !part)) return found;
  for (let i = 0; i < parts[0].length; i++) {
    const strongest = Math.max(...parts.map((part) => part[i]));
    const weight = parts.length > 1 ? parts[1][i] - parts[0][i] : parts[0][i];
    const row = Math.floor(i / wide), column = i % wide;
    if (row !== column && !$("special").checked && isParked(kind, column)) continue;
    if (strongest >= threshold && weight !== 0) found.push([row, column, weight]);
  }
  found.sort((a, b) => Math.abs(a[2]) - Math.abs(b[2]));
  const faint = found.length ? 0.02 * Math.abs(found[found.length - 1][2]) : 0;
  return found.slice(-EDGES).filter((edge) => Math.abs(edge[2]) > faint);
}

function addEdge(svg, kind, side, most, [row, column, weight], path) {
  const size = Math.min(1, Math.abs(weight) / (side === "difference" ? most : 1));
  const sort = side === "difference" ? (weight > 0 ? "more" : "less") : side;
  const edge = make("path", { d: path, class: `edge ${sort}`, "stroke-width": 0.7 + 5 * size, "data-row": row, "data-column": column }, svg);
  edge.style.strokeOpacity = 0.15 + 0.8 * Math.sqrt(size);
  make("title", {}, edge, `${kind.rows[row].whole} → ${kind.columns[column].whole}: ${shown(weight, side)}`);
}

function wirePicking(svg, word, isOn) {
  const pick = (on) => {
    svg.classList.toggle("picked", on);
    for (const edge of svg.querySelectorAll(".edge")) {
      edge.classList.toggle("on", on && isOn(Number(edge.dataset.row), Number(edge.dataset.column)));
    }
    word.classList.toggle("on", on);
  };
  word.setAttribute("tabindex", 0);
  for (const event of ["pointerenter", "focus"]) word.addEventListener(event, () => pick(true));
  for (const event of ["pointerleave", "blur"]) word.addEventListener(event, () => pick(false));
}

const ROW = 21;
function drawArcs(kind, side, edges) {
  const words = longest(kind.rows), count = kind.rows.length, later = kind.masked ? 18 : 120;
  const reach = (span) => Math.min(118, 12 + 9 * span ** 0.8);
  const middle = 126 + words / 2, width = 126 + words + later, height = count * ROW + 6;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  const most = edges.length ? Math.abs(edges[edges.length - 1][2]) : 1, y = (at) => 3 + (at + 0.5) * ROW, half = kind.rows.map((token) => ruler.measureText(token.text).width / 2 + 5);
  for (const edge of edges) {
    const [row, column] = edge, turn = column <= row ? -1 : 1;
    const near = middle + turn * half[row], far = middle + turn * half[column];
    const over = middle + turn * (words / 2 + reach(Math.abs(row - column)) * 1.3);
    const path = row === column ? `M${near} ${y(row) - 4} c-13 -5 -13 13 0 8`
      : `M${near} ${y(row)} C${over} ${y(row)} ${over} ${y(column)} ${far} ${y(column)}`;
    addEdge(svg, kind, side, most, edge, path);
  }
  kind.rows.forEach((token, i) => {
    const place = { x: middle, y: y(i) + 4, "text-anchor": "middle" };
    wirePicking(svg, addWord(svg, token, place, {}), (row, column) => row === i || column === i);
  });
  return svg;
}

function drawCrossing(kind, side, edges) {
  const first = longest(kind.rows), second = longest(kind.columns), gap = 170;
  const left = first, right = first + gap, width = right + second;
  const count = Math.max(kind.rows.length, kind.columns.length), height = count * ROW + 6;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  const most = edges.length ? Math.abs(edges[edges.length - 1][2]) : 1, y = (at) => 3 + (at + 0.5) * ROW, middle = (left + right) / 2;
  for (const edge of edges) {
    const [row, column] = edge;
    addEdge(svg, kind, side, most, edge, `M${left} ${y(row)} C${middle} ${y(row)} ${middle} ${y(column)} ${right} ${y(column)}`);
  }
  kind.rows.forEach((token, i) => {
    wirePicking(svg, addWord(svg, token, { x: left - 5, y: y(i) + 4, "text-anchor": "end" }, {}), (row) => row === i);
  });
  kind.columns.forEach((token, i) => {
    wirePicking(svg, addWord(svg, token, { x: right + 5, y: y(i) + 4 }, {}), (row, column) => column === i);
  });
  return svg;
}

// All layers and heads

const GAP = 3, LEFT = 30, TOP = 20;
let overview = { cell: 24, heads: [] };
function drawOverview() {
  const kind = kindNow(), canvas = $("overview"), side = state.side === "all" ? "tuned" : state.side;
  const own = kind.layers.some((layer) => weightsOf(kind, side === "difference" ? "tuned" : side, layer, 0));
  const heads = ["mean", ...(own ? Array.from({ length: kind.heads }, (_, i) => String(i)) : [])];
  const cell = kind.layers.length * heads.length > 300 ? 26 : 38, scale = window.devicePixelRatio || 1;
  overview = { cell, heads };
  const wide = LEFT + heads.length * (cell + GAP), tall = TOP + kind.layers.length * (cell + GAP);
  Object.assign(canvas, { width: wide * scale, height: tall * scale });
  Object.assign(canvas.style, { width: `${wide}px`, height: `${tall}px` });
  const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  context.scale(scale, scale);
  context.font = `11px ${style.fontFamily}`;
  context.fillStyle = style.getPropertyValue("--soft");
  context.textAlign = "center";
  const x = (i) => LEFT + i * (cell + GAP), y = (k) => TOP + k * (cell + GAP);
  heads.forEach((head, i) => context.fillText(head, x(i) + cell / 2, 13));
  const named = Math.ceil(13 / cell);
  kind.layers.forEach((layer, k) => {
    if (k % named === 0) context.fillText(layer, LEFT / 2, y(k) + cell / 2 + 4);
    heads.forEach((head, i) => {
      const weights = weightsOf(kind, side, layer, head);
      context.fillStyle = style.getPropertyValue("--tint");
      context.fillRect(x(i), y(k), cell, cell);
      if (weights) {
        context.imageSmoothingEnabled = kind.columns.length > cell;
        context.drawImage(paint(kind, weights, side, largest(weights)), x(i), y(k), cell, cell);
      }
      context.fillStyle = style.getPropertyValue("--soft");
    });
  });
  const at = [kind.layers.indexOf(state.layer), heads.indexOf(state.head)];
  if (at[1] >= 0) {
    context.strokeStyle = style.getPropertyValue("--tuned");
    context.lineWidth = 3;
    context.strokeRect(x(at[1]) - 1, y(at[0]) - 1, cell + 2, cell + 2);
  }
}

$("overview").addEventListener("click", (event) => {
  const box = $("overview").getBoundingClientRect(), step = overview.cell + GAP;
  const head = overview.heads[Math.floor((event.clientX - box.left - LEFT) / step)];
  const layer = kindNow().layers[Math.floor((event.clientY - box.top - TOP) / step)];
  if (head === undefined || layer === undefined) return;
  Object.assign(state, { head, layer });
  show();
});

// Choices

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen))));
}

function headChoices(kind) {
  const side = data.sides[0].name, found = [["mean", "mean of all"]];
  if (`${side}/${state.layer}/rollout` in kind.values) found.push(["rollout", "rollout"]);
  for (let head = 0; head < kind.heads; head++) {
    if (`${side}/${state.layer}/${head}` in kind.values) found.push([String(head), `head ${head}`]);
  }
  return found;
}

function show() {
  const kind = kindNow();
  if (!kind.layers.includes(state.layer)) state.layer = kind.shown.layer;
  const heads = headChoices(kind);
  if (!heads.some(([value]) => value === state.head)) state.head = "mean";
  fill($("kind"), data.kinds.map((one, i) => [i, one.title.split(":")[0]]), state.kind);
  const names = isRun ? [["all", "side by side"], ["tuned", "tuned"], ["base", "base"], ["difference", "difference"]] : [];
  fill($("side"), names, state.side);
  fill($("layer"), kind.layers.map((layer) => [layer, layer]), state.layer);
  fill($("head"), heads, state.head);
  $("kind-label").hidden = data.kinds.length < 2;
  $("side-label").hidden = !isRun;
  const whose = { mean: "mean over all heads", rollout: `rollout from layer ${kind.layers[0]} up to this one` };
  $("told").textContent = `${kind.title}. Layer ${state.layer}, ${whose[state.head] || `head ${state.head}`}. `
    + `Rows: ${kind.axes[0]}; columns: ${kind.axes[1]}.`;
  drawMaps();
  drawGraphs();
  drawOverview();
  if (state.row >= 0 && state.row < kind.rows.length && state.column < kind.columns.length) point(state.row, state.column);
  history.replaceState(null, "", `#${new URLSearchParams({ kind: kind.name, side: state.side, layer: state.layer, head: state.head })}`);
}

function start() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state.kind = Math.max(0, data.kinds.findIndex((kind) => kind.name === asked.get("kind")));
  const kind = kindNow(), wide = isRun && kind.columns.length <= 24 && window.innerWidth > 700;
  state.side = asked.get("side") || (isRun ? (wide ? "all" : "tuned") : "model");
  state.layer = asked.has("layer") ? Number(asked.get("layer")) : kind.shown.layer;
  state.head = asked.get("head") || kind.shown.head;
  $("threshold").value = kind.threshold;
  $("kind").addEventListener("change", (event) => {
    state.kind = Number(event.target.value);
    Object.assign(state, { layer: kindNow().shown.layer, row: -1, column: -1 });
    $("threshold").value = kindNow().threshold;
    show();
  });
  $("side").addEventListener("change", (event) => { state.side = event.target.value; show(); });
  $("layer").addEventListener("change", (event) => { state.layer = Number(event.target.value); show(); });
  $("head").addEventListener("change", (event) => { state.head = event.target.value; show(); });
  $("threshold").addEventListener("input", drawGraphs);
  $("special").addEventListener("change", drawGraphs);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);
  show();
}
start();
