"use strict";
// Draws the heatmaps, a cell a number, and reads the cell that is pointed at or stepped to.
const data = JSON.parse(document.getElementById("data").textContent);
const LOW = [33, 102, 172], MIDDLE = [247, 247, 247], HIGH = [178, 24, 43];

function colour(value) {
  const end = value < 0 ? LOW : HIGH, part = Math.abs(value);
  return MIDDLE.map((from, i) => Math.round(from + (end[i] - from) * part));
}

function show(canvas) {
  const map = data.heatmaps[Number(canvas.dataset.map)];
  const bytes = Int8Array.from(atob(map.bytes), (letter) => letter.charCodeAt(0));
  const wide = map.columns.length, tall = map.rows.length;
  canvas.width = wide;
  canvas.height = tall;
  const context = canvas.getContext("2d"), image = context.createImageData(wide, tall);
  bytes.forEach((byte, i) => image.data.set([...colour(byte / 127), 255], 4 * i));
  context.putImageData(image, 0, 0);
  let row = 0, column = 0;

  function read() {
    const named = (axis, number) => (axis === "position" && data.words.length ? `${axis} ${number} (${data.words[number]})` : `${axis} ${number}`);
    const value = (bytes[row * wide + column] / 127) * map.limit;
    document.getElementById(`reading-${canvas.dataset.map}`).textContent =
      `${named(map.down, map.rows[row])}, ${named(map.across, map.columns[column])}: about ${value.toFixed(Math.max(2, 2 - Math.floor(Math.log10(map.limit))))}`;
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    column = Math.min(wide - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * wide)));
    row = Math.min(tall - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * tall)));
    read();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    row = Math.min(tall - 1, Math.max(0, row + step[0]));
    column = Math.min(wide - 1, Math.max(0, column + step[1]));
    read();
  });
}

document.querySelectorAll("canvas[data-map]").forEach(show);
