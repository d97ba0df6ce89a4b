"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const cells = [...document.querySelectorAll("[data-cell]")];
const reading = document.getElementById("reading");
// magma, as in the pictures of attention
const ramp = ["#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf"]
  .map((word) => [1, 3, 5].map((at) => parseInt(word.slice(at, at + 2), 16)));

function digits(value) {
  return value === 0 ? "0" : Number(value.toPrecision(3)).toString();
}

function written(key, value) {
  return key === "relative" ? `${digits(100 * value)} %` : key === "effective_rank" ? value.toFixed(1) : digits(value);
}

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(at), ramp.length - 2);
  return ramp[low].map((part, i) => Math.round(part + (ramp[low + 1][i] - part) * (at - low)));
}

function told(move) {
  const moved = move.relative === null ? "" : `moved by ${digits(100 * move.relative)} %: `;
  const rank = move.effective_rank === null ? "" : `; effective rank ${move.effective_rank.toFixed(1)} of ${move.rank}`;
  return `${move.module} (${move.kind}) ${moved}‖ΔW‖ ${digits(move.change)}, ‖W‖ ${digits(move.weight)}${rank}`;
}

function show(key) {
  const most = Math.max(...Object.values(data.cells).map((move) => move[key] ?? 0)) || 1;
  for (const cell of cells) {
    const move = data.cells[cell.dataset.cell];
    const value = move ? move[key] : null;
    cell.classList.toggle("none", value === null);
    cell.textContent = value === null ? "" : written(key, value);
    const [red, green, blue] = colour((value ?? 0) / most);
    cell.style.background = value === null ? "" : `rgb(${red}, ${green}, ${blue})`;
    cell.style.color = 0.3 * red + 0.59 * green + 0.11 * blue > 140 ? "#000" : "#fff";
  }
  for (const words of document.querySelectorAll("[data-measure]")) words.hidden = words.dataset.measure !== key;
}

for (const cell of cells) {
  const move = data.cells[cell.dataset.cell];
  if (!move) continue;
  cell.tabIndex = 0;
  cell.title = told(move);
  for (const event of ["pointerenter", "focus"]) cell.addEventListener(event, () => { reading.textContent = told(move); });
}
for (const choice of document.querySelectorAll("[name=measure]")) {
  choice.addEventListener("change", () => show(choice.value));
}
if (cells.length) show("relative");
