// The chain as pictures: how far each link brought the training, and when each ran.

import { h, fill } from "./dom.js";
import { ago, clock, moment, toneOf, whole } from "./words.js";

const at = (part) => `${(100 * part).toFixed(3)}%`;

// Steps from left to right: what each link trained, a tick for each checkpoint, what is left.
export function showProgress(node, data) {
  const { step, total_steps: total } = data.status;
  const known = Math.max(total ?? 0, step, data.bands.at(-1)?.[2] ?? 0);
  // Where no end is known the bar fades out behind what is done, and tells no share.
  const end = total ? known : known * 1.25;
  if (!end) return fill(node);
  const parts = data.bands.map(([link, from, upto]) =>
    h("i", { class: `part ${link % 2 ? "odd" : "even"}`, style: { left: at(from / end), width: at((upto - from) / end) }, title: `link ${link}: steps ${whole(from + 1)} to ${whole(upto)}` }),
  );
  const ticks = data.checkpoints.map((checkpoint) => h("i", { class: "tick", style: { left: at(checkpoint.step / end) }, title: `checkpoint of step ${whole(checkpoint.step)}` }));
  const percent = total ? `${Math.floor((100 * step) / total)}%` : "";
  const label = total ? `${whole(step)} of ${whole(total)} steps` : `${whole(step)} steps, no end set`;
  fill(
    node,
    h("div", { class: total ? "bar" : "bar open", role: "progressbar", "aria-label": label, ...(total ? { "aria-valuemin": 0, "aria-valuemax": end, "aria-valuenow": step } : {}) }, parts),
    h("div", { class: "ticks", "aria-hidden": "true" }, ticks),
    h("div", { class: "ends" }, h("span", {}, h("b", {}, whole(step)), total ? ` of ${whole(total)} steps` : " steps"), h("span", {}, percent)),
  );
}

// Time from left to right: when each link ran, how it ended, and the gaps in which a job waited.
export function showTimeline(node, links, now) {
  const known = links.filter((link) => link.began !== null);
  if (!known.length) return fill(node);
  const begin = known[0].began;
  const end = Math.max(...known.map((link) => link.ended ?? now), begin + 1);
  const span = end - begin;
  const blocks = known.map((link) => {
    const until = link.ended ?? now;
    const words = `link ${link.link}: ${clock(until - link.began)}, ${link.cause}`;
    return h("i", { class: `block ${toneOf(link.cause)} ${link.link % 2 ? "odd" : "even"}`, style: { left: at((link.began - begin) / span), width: at(Math.max(0, until - link.began) / span) }, title: words });
  });
  const running = known.reduce((sum, link) => sum + ((link.ended ?? now) - link.began), 0);
  const waited = Math.max(0, span - running);
  const words = `${known.length} links over ${clock(span)}: ${clock(running)} running, ${clock(waited)} between links`;
  fill(
    node,
    h("div", { class: "lane", role: "img", "aria-label": words }, blocks),
    h("div", { class: "ends" }, h("span", {}, moment(begin)), h("span", { class: "middle" }, `${clock(running)} running · ${ago(waited)} between links`), h("span", {}, links.at(-1).ended === null ? "now" : moment(end))),
  );
}
