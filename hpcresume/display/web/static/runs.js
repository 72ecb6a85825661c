// All runs of a folder.

import { fill, fromTemplate, h } from "./dom.js";
import { statePill } from "./run.js";
import { ago, clock, whole } from "./words.js";

const ORDER = ["running", "waiting", "stalled", "failed", "stopped", "complete"];
const URGENT = ["running", "waiting", "stalled"];

function row(key, run, now) {
  const total = run.total_steps;
  const part = total ? Math.min(1, run.step / total) : 0;
  const facts = [
    run.loss === null ? null : ["loss", run.loss.toFixed(4)],
    run.link ? ["link", String(run.link)] : null,
    run.job ? ["job", `${run.job}${run.node ? ` · ${run.node}` : ""}`] : null,
    run.job_ends === null ? null : ["left", clock(run.job_ends - now)],
    run.checkpoint_step === null ? ["saved", "nothing yet"] : ["saved", `step ${whole(run.checkpoint_step)}${run.checkpoint_created ? `, ${ago(now - run.checkpoint_created)} ago` : ""}`],
  ].filter(Boolean);
  const percent = total ? `${Math.floor(100 * part)}%` : "";
  return h(
    "li",
    {},
    h(
      "a",
      { class: "run", href: `?run=${encodeURIComponent(key)}` },
      h("span", { class: "run-name" }, run.name),
      statePill(run.state),
      h("span", { class: "run-bar" }, total ? h("span", { class: "bar thin" }, h("i", { class: `part ${run.state === "complete" ? "whole" : "odd"}`, style: { left: "0", width: `${100 * part}%` } })) : "", h("span", { class: "run-steps" }, total ? `${whole(run.step)} of ${whole(total)}` : whole(run.step), percent ? h("b", {}, percent) : "")),
      h("span", { class: "run-facts" }, facts.map(([term, value]) => h("span", {}, h("span", { class: "dim" }, `${term} `), value))),
      run.why ? h("span", { class: "run-why" }, run.why) : "",
    ),
  );
}

export class RunsView {
  constructor(main) {
    const { content, slots } = fromTemplate("runs-view");
    this.slots = slots;
    fill(main, content);
    this.data = null;
    this.rows = new Map();
    slots.search.addEventListener("input", () => this.show());
    document.title = "Runs · hpcresume";
  }

  update(data, now) {
    this.data = data;
    this.now = now;
    this.show();
  }

  show() {
    const { data, slots } = this;
    const sought = slots.search.value.trim().toLowerCase();
    // What needs eyes first; within that, the newest sign of life.
    const urgency = ([, run]) => (URGENT.indexOf(run.state) + URGENT.length + 1) % (URGENT.length + 1);
    const runs = data.order.map((key) => [key, data.runs[key]]).sort((a, b) => urgency(a) - urgency(b));
    const shown = runs.filter(([, run]) => `${run.name} ${run.state}`.toLowerCase().includes(sought));
    slots.root.textContent = data.root;
    slots.filters.hidden = runs.length < 2;
    const counts = ORDER.map((state) => [state, runs.filter(([, run]) => run.state === state).length]).filter(([, count]) => count);
    slots.counts.textContent = counts.map(([state, count]) => `${count} ${state}`).join(" · ");
    if (!runs.length) {
      fill(slots.list, h("div", { class: "note" }, h("h2", {}, "No run here yet"), h("p", {}, "The first one appears as soon as it is submitted:"), h("p", {}, h("code", {}, "hpcresume submit --time 02:00:00"))));
    } else if (!shown.length) {
      fill(slots.list, h("p", { class: "empty" }, "No run is called so."));
    } else {
      // A row that is the same stays the same element: focus and selection outlive an update.
      const rows = shown.map(([key, run]) => {
        const known = this.rows.get(key);
        if (known && known.run === run) return known.node;
        const node = row(key, run, this.now);
        const focused = known?.node.contains(document.activeElement);
        this.rows.set(key, { run, node });
        if (focused) queueMicrotask(() => node.querySelector("a").focus());
        return node;
      });
      const list = slots.list.querySelector("ul") ?? h("ul", { class: "runs" });
      if (!list.isConnected) fill(slots.list, list);
      if (rows.length !== list.children.length || rows.some((node, i) => list.children[i] !== node)) fill(list, rows);
    }
    fill(slots.damaged, data.damaged.map((words) => h("p", { class: "bad aside" }, words)));
  }

  tick() {}

  recolour() {}
}
