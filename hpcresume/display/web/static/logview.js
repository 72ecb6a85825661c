// The end of the log; it stays at the end as long as its reader does.

import { h, fill } from "./dom.js";

const HEADING = /^── (.*) ──$/;
const LINE = /^(\d\d-\d\d \d\d:\d\d:\d\d) \[([^\]]*)\] (.*)$/s;

function shown(line) {
  const heading = HEADING.exec(line);
  if (heading) return h("div", { class: "heading" }, heading[1]);
  const known = LINE.exec(line);
  if (!known) return h("div", {}, line);
  const [, time, tag, text] = known;
  const level = /-(ERROR|CRITICAL)$/.test(tag) ? "bad" : /-WARNING$/.test(tag) ? "warn" : "";
  return h("div", { class: level }, h("span", { class: "time" }, time), " ", h("span", { class: "tag" }, `[${tag}]`), ` ${text}`);
}

export class LogView {
  constructor(node, state) {
    this.node = node;
    this.state = state;
    this.follows = true;
    this.lines = [];
    node.addEventListener("scroll", () => {
      this.follows = node.scrollTop + node.clientHeight >= node.scrollHeight - 24;
      this.tell();
    });
  }

  update(lines) {
    if (!lines.length) return fill(this.node, h("p", { class: "empty" }, "Nothing is printed yet."));
    // What is there stays there: a reader may have marked some of it.
    const skip = this.lines.length ? lines.indexOf(this.lines[0]) : -1;
    const same = skip === 0 ? this.lines.findIndex((line, i) => line !== lines[i]) : 0;
    const kept = skip === 0 ? (same < 0 ? this.lines.length : same) : 0;
    while (this.node.childNodes.length > kept) this.node.lastChild.remove();
    this.node.append(...lines.slice(kept).map(shown));
    this.lines = lines;
    if (this.follows) this.node.scrollTop = this.node.scrollHeight;
    this.tell();
  }

  tell() {
    this.state.textContent = this.follows ? "" : "scroll down to follow";
  }
}
