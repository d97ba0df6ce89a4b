for (const fold of document.querySelectorAll("details")) fold.open = true;
const found = [...document.querySelectorAll("svg")].map(plot => {
  const box = plot.getBoundingClientRect();
  const marks = [...plot.querySelectorAll("path, rect, circle, polyline, line")];
  const inside = marks.filter(mark => mark.getBoundingClientRect().right <= box.right + 1);
  return [box.width, box.height, marks.length, inside.length];
});
return found;
