"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const EDGES = 600, TALLEST = 1100, SMALLEST = 12, ROW = 21, GAP = 170; // edges of a picture; pixels of maps, cells, rows of words
const state = { kind: 0, side: "", layer: 0, head: "mean", row: -1, column: -1 };
const isRun = data.sides.length > 1;
const kindNow = () => data.kinds[state.kind];

function make(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
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

// Pictures of a map, a pixel a weight

function table(stops) {
  const parts = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (parts.length - 1), low = Math.min(Math.floor(place), parts.length - 2);
    return parts[low].map((part, k) => Math.round(part + (place - low) * (parts[low + 1][k] - part)));
  });
}
const colours = { weight: table(data.colours.weight), difference: table(data.colours.difference) };

function paint(kind, weights, side) {
  const wide = kind.columns.length, tall = kind.rows.length, most = largest(weights);
  const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: tall });
  const context = canvas.getContext("2d"), picture = context.createImageData(wide, tall);
  weights.forEach((weight, i) => {
    if (kind.masked && i % wide > Math.floor(i / wide)) return; // left clear
    const size = Math.sqrt(Math.min(1, Math.abs(weight) / most)); // as in the PNG: small ones are seen, too
    const colour = side === "difference" ? colours.difference[Math.round(127.5 + 127.5 * Math.sign(weight) * size)] : colours.weight[Math.round(255 * size)];
    picture.data.set([...colour, 255], 4 * i);
  });
  context.putImageData(picture, 0, 0);
  return canvas;
}

// Words

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`;
const longest = (tokens) => Math.ceil(Math.max(...tokens.map((token) => ruler.measureText(token.text).width))) + 8;

function addWord(parent, token, place) {
  const word = make("text", { ...place, class: token.special ? "special" : "" }, parent, token.text);
  make("title", {}, word, token.whole);
  return word;
}

// Heatmaps and graphs

const sidesShown = () => (state.side === "all" ? ["base", "tuned", "difference"] : [state.side]);

function drawEach(id, draw) {
  $(id).replaceChildren();
  for (const side of sidesShown()) {
    const weights = weightsOf(kindNow(), side, state.layer, state.head);
    if (!weights) continue;
    const figure = document.createElement("figure"), box = document.createElement("div");
    const name = { difference: "difference: tuned − base", model: "weights" }[side] || side;
    figure.append(Object.assign(document.createElement("figcaption"), { textContent: `${name}, up to ${shown(largest(weights))}` }));
    box.append(draw(kindNow(), weights, side));
    figure.append(box);
    $(id).append(figure);
  }
}

function drawMap(kind, weights, side) {
  const wide = kind.columns.length, tall = kind.rows.length, size = Math.max(wide, tall), beside = sidesShown().length;
  const left = longest(kind.rows), top = longest(kind.columns);
  const fits = Math.floor((($("maps").clientWidth - 26 * (beside - 1)) / beside - left - 18) / wide);
  const wanted = fits >= SMALLEST ? fits : Math.max(SMALLEST, Math.floor(760 / size));
  const cell = Math.max(2, Math.min(28, Math.floor(TALLEST / size), wanted)), every = Math.ceil(13 / cell);
  const svg = make("svg", { width: left + wide * cell + 16, height: top + tall * cell + 2, tabindex: 0, role: "img", "aria-label": kind.title });
  const area = { x: left, y: top, width: wide * cell, height: tall * cell };
  make("rect", { ...area, class: "frame" }, svg);
  make("image", { ...area, href: paint(kind, weights, side).toDataURL(), preserveAspectRatio: "none" }, svg);
  const rows = [], columns = [];
  for (let i = 0; i < tall; i += every) rows[i] = addWord(svg, kind.rows[i], { x: left - 5, y: top + (i + 0.5) * cell + 4, "text-anchor": "end" });
  for (let k = 0; k < wide; k += every) {
    columns[k] = addWord(svg, kind.columns[k], { transform: `translate(${left + (k + 0.5) * cell + 4} ${top - 5}) rotate(-90)` });
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
    const column = Math.floor((event.clientX - box.left - left) / cell), row = Math.floor((event.clientY - box.top - top) / cell);
    if (row >= 0 && row < tall && column >= 0 && column < wide) point(row, column);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const within = (at, most) => Math.max(0, Math.min(most - 1, at));
    point(within(Math.max(0, state.row) + move[0], tall), within(Math.max(0, state.column) + move[1], wide));
  });
  return svg;
}

function point(row, column) {
  Object.assign(state, { row, column });
  for (const svg of document.querySelectorAll("#maps svg")) svg.showCell();
  const kind = kindNow(), words = [kind.rows[row], kind.columns[column]].map((token) => Object.assign(document.createElement("bdi"), { textContent: token.whole }));
  const told = (isRun ? ["base", "tuned", "difference"] : ["model"]).map((side) => {
    const weight = weightsOf(kind, side, state.layer, state.head)[row * kind.columns.length + column];
    return `${side === "model" ? "" : `${side} `}${shown(weight, side)}`;
  });
  $("value").replaceChildren(words[0], " looks at ", words[1], `: ${told.join(", ")}${kind.masked && column > row ? " (hidden: it comes later)" : ""}`);
}

function edgesOf(kind, side, weights) {
  const wide = kind.columns.length, found = [];
  const parts = (side === "difference" ? ["base", "tuned"] : [side]).map((name) => weightsOf(kind, name, state.layer, state.head));
  weights.forEach((weight, i) => {
    const row = Math.floor(i / wide), column = i % wide;
    if (!$("special").checked && (kind.columns[column].special || (kind.same && column === 0))) return; // parked there
    if (weight && Math.max(...parts.map((part) => part[i])) >= Number($("threshold").value)) found.push([row, column, weight]);
  });
  return found.sort((a, b) => Math.abs(a[2]) - Math.abs(b[2])).slice(-EDGES);
}

function drawGraph(kind, weights, side) {
  const left = longest(kind.rows), right = left + GAP, edges = edgesOf(kind, side, weights), y = (at) => 3 + (at + 0.5) * ROW;
  const svg = make("svg", { width: right + longest(kind.columns), height: Math.max(kind.rows.length, kind.columns.length) * ROW + 6 });
  const most = side === "difference" && edges.length ? Math.abs(edges[edges.length - 1][2]) : 1;
  for (const [row, column, weight] of edges) {
    const size = Math.min(1, Math.abs(weight) / most), sort = side !== "difference" ? side : weight > 0 ? "more" : "less";
    const line = { x1: left, y1: y(row), x2: right, y2: y(column), class: `edge ${sort}`, "stroke-width": 0.7 + 5 * size, "data-row": row, "data-column": column };
    const edge = make("line", line, svg);
    edge.style.strokeOpacity = 0.15 + 0.8 * Math.sqrt(size);
    make("title", {}, edge, `${kind.rows[row].whole} → ${kind.columns[column].whole}: ${shown(weight, side)}`);
  }
  const sides = [["row", kind.rows, { x: left - 5, "text-anchor": "end" }], ["column", kind.columns, { x: right + 5 }]];
  for (const [axis, tokens, place] of sides) {
    tokens.forEach((token, at) => {
      const word = addWord(svg, token, { ...place, y: y(at) + 4, tabindex: 0 });
      const pick = (on) => {
        svg.classList.toggle("picked", on);
        word.classList.toggle("on", on);
        for (const edge of svg.querySelectorAll(".edge")) edge.classList.toggle("on", on && Number(edge.dataset[axis]) === at);
      };
      for (const event of ["pointerenter", "focus"]) word.addEventListener(event, () => pick(true));
      for (const event of ["pointerleave", "blur"]) word.addEventListener(event, () => pick(false));
    });
  }
  return svg;
}

function drawGraphs() {
  $("threshold-value").textContent = Number($("threshold").value).toFixed(3);
  drawEach("graphs", drawGraph);
}

// Attention on pictures

const onPictures = new Map();
function weightsOnPictures(side, layer, head) {
  if (side === "difference") {
    const base = weightsOnPictures("base", layer, head), tuned = weightsOnPictures("tuned", layer, head);
    return base && tuned ? tuned.map((weight, i) => weight - base[i]) : null;
  }
  const key = `${side}/${layer}/${head}`;
  if (onPictures.has(key)) return onPictures.get(key);
  if (!(key in data.pictures.values)) return null;
  const bytes = atob(data.pictures.values[key]), weights = new Float32Array(bytes.length / 2);
  for (let i = 0; i < weights.length; i++) weights[i] = (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) / data.full;
  onPictures.set(key, weights);
  return weights;
}

function paintPatches(grid, weights, side) {
  const tall = grid.tokens.length, wide = grid.tokens[0].length, most = largest(weights);
  const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: tall });
  const context = canvas.getContext("2d"), image = context.createImageData(wide, tall);
  grid.tokens.flat().forEach((token, i) => {
    const weight = weights[token], size = Math.sqrt(Math.min(1, Math.abs(weight) / most));
    const colour = side === "difference" ? colours.difference[Math.round(127.5 + 127.5 * Math.sign(weight) * size)] : colours.weight[Math.round(255 * size)];
    image.data.set([...colour, Math.round(255 * (0.15 + 0.65 * (side === "difference" ? size : 1 - size)))], 4 * i); // as in the PNG
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawPicture(item, grid, weights, side, name) {
  const figure = document.createElement("figure"), [left, top, right, bottom] = grid.box, { width, height } = item;
  const share = weights.reduce((sum, weight) => sum + weight, 0);
  figure.append(Object.assign(document.createElement("figcaption"), { textContent: `${name}: ${shown(share, side)} in all, up to ${shown(largest(weights), side)} a patch` }));
  const svg = make("svg", { width: Math.min(width, 440), viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  make("image", { width, height, href: item.src }, svg);
  const area = { x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height };
  make("image", { ...area, class: "heat", href: paintPatches(grid, weights, side).toDataURL(), preserveAspectRatio: "none" }, svg);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width - left) / (right - left), y = ((event.clientY - box.top) / box.height - top) / (bottom - top);
    const token = grid.tokens[Math.floor(y * grid.tokens.length)]?.[Math.floor(x * grid.tokens[0].length)];
    if (token !== undefined) $("patch").textContent = `${name}, patch ${token}: ${shown(weights[token], side)}`;
  });
  figure.append(svg);
  return figure;
}

function drawPictures() {
  if (!data.pictures) return;
  const count = data.pictures.items.reduce((sum, item) => sum + item.count, 0);
  $("patches").replaceChildren();
  for (const side of sidesShown()) {
    const rows = weightsOnPictures(side, state.layer, state.head);
    let first = Number($("word").value) * count;
    for (const item of rows ? data.pictures.items : []) {
      const weights = rows.slice(first, (first += item.count));
      for (const grid of item.grids) {
        const name = [side === "model" ? "" : side, item.name, item.grids.length > 1 ? grid.name : ""].filter(Boolean).join(", ");
        $("patches").append(drawPicture(item, grid, weights, side, name));
      }
    }
  }
}

function startPictures() {
  if (!data.pictures?.items.some((item) => item.grids.length)) return;
  const tokens = data.kinds[0].rows, words = tokens.map((token, i) => [i, i + 1 < tokens.length ? `${token.text} → ${tokens[i + 1].text}` : token.text]);
  $("pictures").hidden = false;
  fill($("word"), words.slice(data.pictures.first), data.pictures.row);
  $("word").addEventListener("change", drawPictures);
}

// All layers and heads

const LEFT = 30, TOP = 20;
let overview = { step: 27, heads: [] };
function drawOverview() {
  const kind = kindNow(), canvas = $("overview"), side = state.side === "all" ? "tuned" : state.side, style = getComputedStyle(document.body);
  const heads = headChoices(kind).map(([value]) => value).filter((head) => head !== "rollout");
  const cell = kind.layers.length * heads.length > 300 ? 26 : 38, scale = window.devicePixelRatio || 1, step = cell + 3;
  const wide = LEFT + heads.length * step, tall = TOP + kind.layers.length * step, context = canvas.getContext("2d");
  overview = { step, heads };
  Object.assign(canvas, { width: wide * scale, height: tall * scale });
  Object.assign(canvas.style, { width: `${wide}px`, height: `${tall}px` });
  context.scale(scale, scale);
  Object.assign(context, { font: `11px ${style.fontFamily}`, textAlign: "center", lineWidth: 3, strokeStyle: style.getPropertyValue("--tuned") });
  heads.forEach((head, i) => {
    context.fillStyle = style.getPropertyValue("--soft");
    context.fillText(head, LEFT + i * step + cell / 2, 13);
    kind.layers.forEach((layer, k) => {
      const x = LEFT + i * step, y = TOP + k * step, weights = weightsOf(kind, side, layer, head);
      context.fillStyle = style.getPropertyValue("--soft");
      if (i === 0) context.fillText(layer, LEFT / 2, y + cell / 2 + 4);
      context.fillStyle = style.getPropertyValue("--tint");
      context.fillRect(x, y, cell, cell);
      context.imageSmoothingEnabled = kind.columns.length > cell;
      if (weights) context.drawImage(paint(kind, weights, side), x, y, cell, cell);
      if (layer === state.layer && head === state.head) context.strokeRect(x - 1, y - 1, cell + 2, cell + 2);
    });
  });
}

$("overview").addEventListener("click", (event) => {
  const box = $("overview").getBoundingClientRect();
  const head = overview.heads[Math.floor((event.clientX - box.left - LEFT) / overview.step)];
  const layer = kindNow().layers[Math.floor((event.clientY - box.top - TOP) / overview.step)];
  if (head === undefined || layer === undefined) return;
  Object.assign(state, { head, layer });
  show();
});

// Choices

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen))));
}

function headChoices(kind) {
  const all = [["mean", "mean of all"], ["rollout", "rollout"], ...Array.from({ length: kind.heads }, (_, i) => [String(i), `head ${i}`])];
  return all.filter(([value]) => `${data.sides[0]}/${state.layer}/${value}` in kind.values);
}

function show() {
  const kind = kindNow();
  if (!kind.layers.includes(state.layer)) state.layer = kind.shown.layer;
  const heads = headChoices(kind);
  if (!heads.some(([value]) => value === state.head)) state.head = "mean";
  fill($("kind"), data.kinds.map((one, i) => [i, one.title.split(":")[0]]), state.kind);
  fill($("side"), isRun ? [["all", "side by side"], ["tuned", "tuned"], ["base", "base"], ["difference", "difference"]] : [], state.side);
  fill($("layer"), kind.layers.map((layer) => [layer, layer]), state.layer);
  fill($("head"), heads, state.head);
  $("kind-label").hidden = data.kinds.length < 2;
  $("side-label").hidden = !isRun;
  const whose = { mean: "mean over all heads", rollout: `rollout from layer ${kind.layers[0]} up to this one` };
  $("told").textContent = `${kind.title}. Layer ${state.layer}, ${whose[state.head] || `head ${state.head}`}. Rows: ${kind.axes[0]}; columns: ${kind.axes[1]}.`;
  drawPictures();
  drawEach("maps", drawMap);
  drawGraphs();
  drawOverview();
  if (state.row >= 0 && state.row < kind.rows.length && state.column < kind.columns.length) point(state.row, state.column);
  history.replaceState(null, "", `#${new URLSearchParams({ kind: kind.name, side: state.side, layer: state.layer, head: state.head })}`);
}

function start() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state.kind = Math.max(0, data.kinds.findIndex((kind) => kind.name === asked.get("kind")));
  const kind = kindNow(), wide = kind.columns.length <= 24 && window.innerWidth > 700;
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
  for (const id of ["side", "layer", "head"]) {
    $(id).addEventListener("change", (event) => {
      state[id] = id === "layer" ? Number(event.target.value) : event.target.value;
      show();
    });
  }
  $("threshold").addEventListener("input", drawGraphs);
  $("special").addEventListener("change", drawGraphs);
  startPictures();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);
  show();
}
start();
