// The tables of a run: links, checkpoints, journal.

import { h, fill, shape } from "./dom.js";
import { ago, clock, fullMoment, moment, num, sizeWords, TONE_SHAPES, toneOf, whole } from "./words.js";

const when = (t) => (t === null ? "" : h("time", { datetime: new Date(t * 1000).toISOString(), title: fullMoment(t) }, moment(t)));

// columns: [title, class]; a row has a cell for each. A column in which no row says anything is left out.
function table(columns, rows) {
  const told = columns.map((_, i) => rows.some((cells) => cells[i] !== ""));
  const head = h("tr", {}, columns.map(([title, kind], i) => (told[i] ? h("th", { scope: "col", class: kind }, title) : "")));
  const body = rows.map((cells) => h("tr", {}, cells.map((cell, i) => (told[i] ? h("td", { class: columns[i][1], "data-label": columns[i][0] }, cell) : ""))));
  return h("table", {}, h("thead", {}, head), h("tbody", {}, body));
}

const LINKS = [["Link", "n"], ["Ended by", ""], ["Steps", "n"], ["Time", "n"], ["Job", ""], ["Node", ""], ["Began", "t"], ["Why", "long"]];

export function showLinks(node, links, now) {
  if (!links.length) return fill(node, h("p", { class: "empty" }, "No link has begun yet."));
  const rows = links.toReversed().map((link) => {
    const tone = toneOf(link.cause);
    const lasted = link.ended === null ? now - (link.began ?? now) : link.seconds;
    return [
      String(link.link),
      h("span", { class: `end ${tone}` }, shape(TONE_SHAPES[tone]), link.cause),
      h("span", { title: `${whole(Math.max(0, link.last_step - link.first_step))} steps` }, `${whole(link.first_step)} → ${whole(link.last_step)}`),
      clock(lasted),
      link.job,
      link.node,
      when(link.began),
      link.detail,
    ];
  });
  fill(node, table(LINKS, rows));
}

const CHECKPOINTS = [["Step", "n"], ["Epoch", "n"], ["Size", "n"], ["Saved", "t"], ["Written in", "n"], ["Link", "n"], ["Verified", ""], ["Metric", "n"], ["Stays", "long"]];
const RULES = { last: "among the newest", best: "best", every: "for good, by its step", pinned: "pinned" };

export function showCheckpoints(node, data, now) {
  const left = Object.entries(data.left_out).map(([step, reason]) => h("p", { class: "bad aside" }, `checkpoint-${step} does not count: ${reason}`));
  if (!data.checkpoints.length) return fill(node, h("p", { class: "empty" }, "No checkpoint yet."), left);
  const rows = data.checkpoints.toReversed().map((c) => [
    whole(c.step),
    String(c.epoch + 1),
    sizeWords(c.bytes),
    h("time", { datetime: new Date(c.created * 1000).toISOString(), title: fullMoment(c.created) }, `${ago(now - c.created)} ago`),
    c.seconds === null ? "" : `${c.seconds.toFixed(1)} s`,
    String(c.link),
    c.verified ? h("span", { class: "end good", title: c.verified === "read back" ? "every byte was read back by a later link" : "every byte was hashed when it was written" }, shape("check"), c.verified) : h("span", { class: "dim" }, "not known"),
    c.metric === null ? "" : num(c.metric),
    h("span", { class: "marks" }, c.best ? h("span", { class: "mark-best" }, shape("star"), "best") : "", c.pinned ? h("span", {}, shape("pin"), "pinned") : "", c.kept.filter((rule) => rule !== "best" && rule !== "pinned").map((rule) => h("span", { class: "dim" }, RULES[rule] ?? rule)), c.kept.length ? "" : h("span", { class: "dim" }, "until the next one")),
  ]);
  fill(node, table(CHECKPOINTS, rows), left);
}

const LOUD = { completed: "good", save_failed: "bad", quarantined: "bad", cancelled: "calm", decided: "" };
const JOURNAL_WORDS = { stop_asked: "stop asked", save_failed: "not saved" };

export function showJournal(node, entries) {
  if (!entries.length) return fill(node, h("p", { class: "empty" }, "Nothing is recorded yet."));
  const rows = entries.toReversed().map((entry) =>
    h("li", {}, when(entry.t), h("span", { class: "of" }, entry.link ? String(entry.link) : "–"), h("b", { class: LOUD[entry.kind] ?? "" }, JOURNAL_WORDS[entry.kind] ?? entry.kind), h("span", {}, entry.text)),
  );
  fill(node, h("ol", { class: "journal" }, rows));
}
