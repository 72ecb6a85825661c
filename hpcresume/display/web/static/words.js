// Numbers, times and states as people read them; the same words as in the terminal.

export const STATES = {
  running: { shape: "dot", tone: "live" },
  waiting: { shape: "ring", tone: "wait" },
  complete: { shape: "check", tone: "good" },
  stopped: { shape: "square", tone: "calm" },
  failed: { shape: "cross", tone: "bad" },
  stalled: { shape: "triangle", tone: "bad" },
};

const PLANNED = new Set(["deadline", "time limit", "preempted"]);
const CALM = new Set(["cancelled", "stopped", "expired", "fenced"]);

// How a link's end is shown: what belongs to a chain's normal life is quiet.
export function toneOf(cause) {
  if (cause === "running") return "live";
  if (cause === "completed") return "good";
  if (PLANNED.has(cause)) return "plan";
  return CALM.has(cause) ? "calm" : "bad";
}

export const TONE_SHAPES = { live: "dot", good: "check", plan: "ring", calm: "square", bad: "cross" };

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const days = Math.floor(whole / 86400);
  const hours = Math.floor((whole % 86400) / 3600);
  const rest = `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return days ? `${days} d ${hours}:${rest}` : `${hours}:${rest}`;
}

export function ago(seconds) {
  const s = Math.max(0, seconds);
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

export function sizeWords(bytes) {
  let size = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 1000) return unit === "B" ? `${Math.round(size)} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(1)} TB`;
}

// Four digits, and no more zeros than needed.
export function num(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export const whole = (value) => Math.round(value).toLocaleString("en");

export const secondsWords = (value) => {
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${num(value * 1e6)} µs`;
  return value < 1 ? `${num(value * 1e3)} ms` : `${num(value)} s`;
};

export const share = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;

// A moment in the reader's own time zone: the hour today, the day as well otherwise.
export function moment(t) {
  const date = new Date(t * 1000);
  const time = date.toLocaleTimeString("en-GB");
  if (date.toDateString() === new Date().toDateString()) return time;
  const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  const year = date.getFullYear() === new Date().getFullYear() ? "" : ` ${date.getFullYear()}`;
  return `${day}${year} ${time}`;
}

export const fullMoment = (t) => new Date(t * 1000).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC");
