"use strict";
// Shows one step of an answer: the layers' readings, the words that could come next, and the text so far.
const data = JSON.parse(document.getElementById("data").textContent);
const SHOWN = 12, SUREST = 62;
const at = (id) => document.getElementById(id);
const word = (token) => data.labels[token.text];
const steps = () => data.traces[side].steps;
const sides = Object.keys(data.traces);
let side = sides[sides.length - 1], step = 0;

const tops = [...new Set([...Array.from({ length: 20 }, (_, i) => (i + 1) / 20), data.choice.top_p])].sort((a, b) => a - b);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function percent(value) {
  const number = 100 * value;
  if (number >= 99.95) return number >= 99.9995 ? "100 %" : "> 99.9 %";
  if (number >= 0.1) return number.toFixed(1) + " %";
  return number >= 0.001 ? Number(number.toPrecision(2)) + " %" : "< 0.001 %";
}

// What temperature, top-k and top-p leave of the listed words, in this order, as sampling does; min-p comes last.
function keep(now, temperature, topP) {
  const { choice } = data;
  if (temperature === choice.temperature && topP === choice.top_p) return { shares: now.candidates.map((one) => one.kept), count: now.kept_tokens, more: false };
  const z = now.partitions[data.temperatures.indexOf(temperature)];
  let shares = now.candidates.map(({ probability: p }) => (p > 0 ? Math.exp(Math.log(p) / temperature - z) : 0));
  const k = choice.top_k;
  if (k) {
    const first = shares.slice(0, k), sum = first.reduce((a, b) => a + b, 0);
    shares = shares.map((share, i) => (i < k ? share / sum : 0));
  }
  let before = 0;
  const floor = (choice.min_p || 0) * shares[0];
  const kept = shares.map((share) => {
    const stays = share > 0 && (topP >= 1 || before < topP) && share >= floor;
    before += share;
    return stays ? share : 0;
  });
  const more = kept[kept.length - 1] > 0 && before < Math.min(topP, 1) - 1e-6;
  // where more words are kept than are listed, what they add up to lies just above top-p
  const total = topP >= 1 && !k && !floor ? 1 : more ? topP : kept.reduce((a, b) => a + b, 0);
  return { shares: kept.map((share) => share / total), count: kept.filter((share) => share > 0).length, more };
}

function drawSteps() {
  const box = at("step-chips");
  box.replaceChildren();
  steps().forEach((now, i) => {
    const label = element("label");
    const input = element("input");
    Object.assign(input, { type: "radio", name: "step", value: i, checked: i === step });
    input.addEventListener("change", () => choose(i));
    const text = element("span", word(now.token));
    text.title = percent(now.probability);
    text.style.background = `color-mix(in srgb, var(${side === "base" ? "--base" : "--tuned"}) ${(now.probability * 45).toFixed(0)}%, transparent)`;
    label.append(input, text);
    if (data.parting === i) { label.classList.add("parts"); label.title = "here base and tuned part"; }
    box.append(label);
  });
}

function drawGrid() {
  const shown = steps(), grid = at("grid");
  const readable = shown.length > 0 && shown.every((now) => now.layers);
  at("no-lens").hidden = readable;
  at("grid-frame").hidden = !readable;
  grid.className = `lens ${side}`;
  grid.replaceChildren();
  if (!readable) return;
  const head = element("tr"), body = element("tbody");
  head.append(element("th", "layer"));
  shown.forEach((now, i) => {
    const name = element("th", word(now.token));
    name.dataset.step = i;
    head.append(name);
  });
  for (let layer = shown[0].layers.length - 1; layer >= 0; layer--) {
    const row = element("tr");
    row.append(element("th", String(layer)));
    shown.forEach((now, i) => {
      const first = now.layers[layer].says[0];
      const cell = element("td", word(first), first.id === now.token.id ? "agrees" : "");
      cell.style.setProperty("--sure", (first.probability * SUREST).toFixed(1) + "%");
      Object.assign(cell.dataset, { step: i, layer });
      cell.title = told(now, layer);
      row.append(cell);
    });
    body.append(row);
  }
  const top = element("thead");
  top.append(head);
  grid.append(top, body);
}

function told(now, layer) {
  const { says, chosen } = now.layers[layer];
  const list = says.map((one) => `${word(one)} ${percent(one.probability)}`).join(", ");
  return `layer ${layer} would predict ${list}; “${word(now.token)}” ${percent(chosen)}`;
}

function drawBars() {
  const now = steps()[step], bars = at("bars");
  const temperature = data.temperatures[at("t").value], topP = tops[at("p").value];
  at("t-value").textContent = temperature.toFixed(2).replace(/0$/, "");
  at("p-value").textContent = topP.toFixed(2);
  bars.replaceChildren();
  if (!now) { at("summary").textContent = "There is no such step."; return; }
  const { shares, count, more } = keep(now, temperature, topP);
  const kept = topP >= 1 && !data.choice.top_k && !data.choice.min_p ? "all words" : more ? `more than ${count} words` : count === 1 ? "one word" : `${count} words`;
  at("summary").textContent = `“${word(now.token)}” was chosen, at ${percent(now.probability)}. Undecided by ${now.entropy_bits.toFixed(2)} bits: as between ${(2 ** now.entropy_bits).toFixed(1)} equally likely words. Temperature ${at("t-value").textContent} and top-p ${at("p-value").textContent} would keep ${kept}.`;
  const list = now.candidates.map((one, i) => [one, one.probability, i]).slice(0, SHOWN);
  const chosen = now.candidates.findIndex((one) => one.id === now.token.id);
  if (chosen >= SHOWN) list.push([now.candidates[chosen], now.candidates[chosen].probability, chosen]);
  for (const [one, p, i] of list) {
    const row = element("tr", undefined, [one.id === now.token.id && "said", !shares[i] && "cut"].filter(Boolean).join(" "));
    const name = element("th", word(one));
    name.scope = "row";
    row.append(name, bar(p), element("td", percent(p), "num"), bar(shares[i]), element("td", shares[i] ? percent(shares[i]) : "cut off", "num"));
    bars.append(row);
  }
  const rest = Math.max(0, 1 - list.reduce((sum, [, p]) => sum + p, 0));
  const row = element("tr", undefined, "cut"), name = element("th", "all others");
  name.scope = "row";
  row.append(name, bar(rest), element("td", percent(rest), "num"), element("td"), element("td"));
  bars.append(row);
}

function bar(share) {
  const cell = element("td", undefined, "barred"), meter = element("div", undefined, "meter"), fill = element("b");
  fill.style.width = (100 * share).toFixed(1) + "%";
  meter.append(fill);
  cell.append(meter);
  return cell;
}

function drawOutput() {
  at("so-far").replaceChildren(...steps().map((now, i) => element("span", word(now.token), "chip" + (i === step ? " now" : i > step && !data.masked ? " later" : ""))));
}

function choose(i) {
  step = Math.max(0, Math.min(i, steps().length - 1));
  const input = document.querySelector(`input[name=step][value="${step}"]`);
  if (input) input.checked = true;
  for (const cell of at("grid").querySelectorAll("[data-step]")) cell.classList.toggle("now", Number(cell.dataset.step) === step);
  at("cell").textContent = "";
  drawBars();
  drawOutput();
}

function chooseSide(name) {
  side = name;
  drawSteps();
  drawGrid();
  choose(step);
}

at("t").max = data.temperatures.length - 1;
at("t").value = data.temperatures.indexOf(data.choice.temperature);
at("p").max = tops.length - 1;
at("p").value = tops.indexOf(data.choice.top_p);
at("t").addEventListener("input", drawBars);
at("p").addEventListener("input", drawBars);
for (const input of document.querySelectorAll("input[name=side]")) {
  input.addEventListener("change", () => chooseSide(input.value));
  if (input.checked) side = input.value;
}
at("grid").addEventListener("click", (event) => {
  const cell = event.target.closest("[data-step]");
  if (!cell) return;
  choose(Number(cell.dataset.step));
  if (cell.dataset.layer !== undefined) at("cell").textContent = told(steps()[step], Number(cell.dataset.layer));
});
step = data.parting || 0;
chooseSide(side);
