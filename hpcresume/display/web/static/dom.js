// Building elements. Text is always text: no name, message or log line is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) node.style.setProperty(key, to);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// A template's content, and its marked places by name.
export function fromTemplate(id) {
  const content = document.getElementById(id).content.cloneNode(true);
  const slots = {};
  for (const node of content.querySelectorAll("[data-slot]")) slots[node.dataset.slot] = node;
  return { content, slots };
}

// Each state has a shape of its own, for those who cannot tell the colours apart.
const SHAPES = {
  check: "M3.5 8.5l3 3 6-7",
  cross: "M4 4l8 8M12 4l-8 8",
  square: "M4.5 4.5h7v7h-7z",
  triangle: "M8 3l5.5 10h-11z",
  ring: "M8 3a5 5 0 1 0 .01 0zM8 5.5V8l2 1.5",
  dot: "M8 4.2a3.8 3.8 0 1 0 .01 0z",
  star: "M8 2.5l1.7 3.6 3.8.5-2.8 2.7.7 3.9L8 11.3l-3.4 1.9.7-3.9L2.5 6.6l3.8-.5z",
  pin: "M8 14V9.5M5 2.5h6M6 2.5v4L4 9.5h8L10 6.5v-4",
};

export function shape(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `shape ${name}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}
