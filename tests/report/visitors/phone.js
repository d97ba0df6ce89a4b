for (const fold of page.querySelectorAll("details")) fold.open = true;
const scrolls = node => node && (/auto|scroll/.test(frame.contentWindow.getComputedStyle(node).overflowX)
  || scrolls(node.parentElement));
const out = [...page.querySelectorAll("body *")].filter(
  node => node.getBoundingClientRect().right > frame.clientWidth + 1 && !scrolls(node));
const found = [frame.clientWidth, page.documentElement.scrollWidth, out.map(node => node.outerHTML.slice(0, 80))];
const pre = document.createElement("pre");
pre.id = "measured";
pre.textContent = JSON.stringify(found);
document.documentElement.append(pre);
