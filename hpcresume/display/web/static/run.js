// One run.

import { showProgress, showTimeline } from "./chain.js";
import { Charts } from "./charts.js";
import { fill, fromTemplate, h, shape } from "./dom.js";
import { LogView } from "./logview.js";
import { showCheckpoints, showJournal, showLinks } from "./tables.js";
import { ago, clock, num, secondsWords, sizeWords, STATES, whole } from "./words.js";

export function statePill(state) {
  const known = STATES[state] ?? STATES.stalled;
  return h("span", { class: `pill ${known.tone}` }, shape(known.shape), state);
}

// A moment to come as people say it: the hour today, the weekday within a week.
function soon(text) {
  const date = new Date(text);
  const time = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const days = (date - new Date().setHours(0, 0, 0, 0)) / 86400000;
  if (days < 1) return time;
  return days < 7 ? `${date.toLocaleDateString("en-GB", { weekday: "short" })} ${time}` : date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

function calendarWords({ calendar, state }) {
  const further = calendar.links_left - (state === "running" ? 1 : 0);
  const links = further ? `${further} more link${further === 1 ? "" : "s"}` : "in this link";
  return calendar.best === calendar.expected ? links : `${links}; at best ${soon(calendar.best)}`;
}

// [term, value, aside]; what is not known is left out.
function factsOf(data, now) {
  const { status, pace, machine } = data;
  const live = status.state === "running";
  const step = machine.step_s_p50?.latest?.[1] ?? pace.latest?.[1] ?? null;
  const left = status.total_steps && step ? Math.max(0, status.total_steps - status.step) * step : null;
  const last = data.checkpoints.at(-1);
  return [
    ["Loss", status.loss === null ? null : status.loss.toFixed(4)],
    ["Epoch", status.epoch ? status.epoch.toFixed(2) : null],
    ["Link", status.link ? String(status.link) : null, [status.job && `job ${status.job}`, status.node].filter(Boolean).join(" · ")],
    ["A step takes", step === null ? null : secondsWords(step), step ? `${num(1 / step)} a second` : ""],
    ["This job has left", live && data.job_ends ? clock(data.job_ends - now) : null],
    ["Training left", left !== null && status.state !== "complete" ? clock(left) : null, "without the queue"],
    ["Complete", status.calendar ? `about ${soon(status.calendar.expected)}` : null, status.calendar ? calendarWords(status) : ""],
    ["Last checkpoint", last ? `step ${whole(last.step)}` : null, last ? `${ago(now - last.created)} ago${last.verified ? ", verified" : ""}` : ""],
    [live ? "Queued behind it" : "Queued", status.queued.length ? `${status.queued.length} job${status.queued.length > 1 ? "s" : ""}` : null, status.queued.slice(0, 3).join(", ")],
  ].filter(([, value]) => value !== null);
}

export class RunView {
  constructor(main) {
    const { content, slots } = fromTemplate("run-view");
    this.slots = slots;
    fill(main, content);
    this.charts = new Charts(slots.charts);
    this.log = new LogView(slots.log, slots["log-state"]);
    this.data = null;
  }

  // `now` is the server's clock.
  update(data, now) {
    const before = this.data ?? {};
    const changed = (...names) => names.some((name) => before[name] !== data[name]);
    const { slots } = this;
    this.data = data;
    document.title = `${data.status.state === "running" && data.status.total_steps ? `${Math.floor((100 * data.status.step) / data.status.total_steps)}% ` : ""}${data.name} · hpcresume`;
    if (changed("name", "status", "why")) {
      slots.name.textContent = data.name;
      fill(slots.state, statePill(data.status.state));
      slots.sentence.textContent = data.why.sentence;
      fill(slots.next, data.why.next.map(({ why, command }) => h("p", {}, why, command ? [" ", h("code", {}, command)] : "")));
    }
    if (changed("status", "bands", "checkpoints")) showProgress(slots.chain, data);
    if (changed("curves", "machine", "pace", "bands")) slots["curves-section"].hidden = !this.charts.update(data);
    if (changed("links")) slots["links-count"].textContent = data.links.length || "";
    if (changed("checkpoints")) {
      const bytes = data.checkpoints.reduce((sum, c) => sum + c.bytes, 0);
      slots["checkpoints-count"].textContent = data.checkpoints.length ? `${data.checkpoints.length} · ${sizeWords(bytes)}${data.free_bytes ? ` · ${sizeWords(data.free_bytes)} free` : ""}` : "";
    }
    if (changed("entries")) showJournal(slots.journal, data.entries);
    if (changed("log")) this.log.update(data.log);
    if (changed("links")) showLinks(slots.links, data.links, now);
    if (changed("checkpoints", "left_out")) showCheckpoints(slots.checkpoints, data, now);
    this.tick(now, changed("status", "pace", "machine", "links"));
  }

  // What moves with the clock alone.
  tick(now, anyway = false) {
    const { data, slots } = this;
    const moves = ["running", "waiting"].includes(data.status.state);
    if (!moves && !anyway) return;
    const facts = factsOf(data, now).map(([term, value, aside]) => h("div", {}, h("dt", {}, term), h("dd", {}, value, aside ? h("small", {}, aside) : "")));
    fill(slots.facts, facts);
    // Rows of about the same length, where the page is wide: of nine none stands alone.
    slots.facts.style.setProperty("--columns", Math.ceil(facts.length / Math.ceil(facts.length / 8)));
    showTimeline(slots.timeline, data.links, now);
  }

  recolour() {
    this.charts.recolour();
  }
}
