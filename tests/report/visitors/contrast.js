const light = colour => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map(part => (part /= 255) <= .04045 ? part / 12.92
    : ((part + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = node => {
  const colour = getComputedStyle(node).backgroundColor;
  return /, 0\)$/.test(colour) && node.parentElement ? ground(node.parentElement) : colour;
};
for (const fold of document.querySelectorAll("details")) fold.open = true;
const texts = [...document.querySelectorAll("body *")].filter(node => !node.closest("svg") && node.offsetWidth
  && [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()));
const found = [getComputedStyle(document.body).backgroundColor, texts.map(node => {
  const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
  const large = parseFloat(getComputedStyle(node).fontSize) >= 24;
  return [(a + .05) / (b + .05) / (large ? 3 : 4.5), node.textContent.trim().slice(0, 40)];
})];
return found;
