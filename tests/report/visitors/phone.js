for (const fold of document.querySelectorAll("details")) fold.open = true;
const scrolls = node => node && (/auto|scroll/.test(getComputedStyle(node).overflowX)
  || scrolls(node.parentElement));
const out = [...document.querySelectorAll("body *")].filter(
  node => node.getBoundingClientRect().right > innerWidth + 1 && !scrolls(node));
const found = [innerWidth, document.documentElement.scrollWidth, out.map(node => node.outerHTML.slice(0, 80))];
return found;
