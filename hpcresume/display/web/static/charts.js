// Which charts a run has: what it logged, how long its steps took, what its machine did.

import { Chart } from "./chart.js";
import { fill } from "./dom.js";
import { num, secondsWords, share, sizeWords } from "./words.js";

const FIRST = [/^loss$/, /loss/, /^(lr|learning_rate)/, /lr/, /^grad_norm$/];

const rank = (name) => {
  const at = FIRST.findIndex((pattern) => pattern.test(name));
  return at < 0 ? FIRST.length : at;
};

function formatOf(name) {
  if (/_bytes$/.test(name)) return sizeWords;
  if (/_s(_p\d+)?$/.test(name) || /^(step_)?time$/.test(name)) return secondsWords;
  return num;
}

// Several curves on one chart share their steps: the monitor sees all at once.
function together(curves, names) {
  const there = names.filter(([name]) => curves[name]?.steps.length);
  const steps = [...new Set(there.flatMap(([name]) => curves[name].steps))].sort((a, b) => a - b);
  return there.map(([name, label]) => {
    const curve = curves[name];
    if (curve.steps.length === steps.length) return { ...curve, label };
    const at = new Map(curve.steps.map((step, index) => [step, curve.mean[index]]));
    return { steps, mean: steps.map((step) => at.get(step) ?? null), latest: curve.latest, bad: curve.bad, label };
  });
}

// [key, title, format, lines]
function wanted({ curves, machine, pace }) {
  const found = Object.keys(curves)
    .filter((name) => curves[name].steps.length || curves[name].bad.length)
    .sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1))
    .map((name) => [`m ${name}`, name, formatOf(name), [{ ...curves[name], label: "" }]]);
  const measured = together(machine, [["step_s_p50", "median"], ["step_s_p95", "95%"], ["step_s_p99", "99%"]]);
  if (measured.length) found.push(["step time", "Time of a step", secondsWords, measured]);
  else if (pace.steps.length) found.push(["step time", "Time of a step", secondsWords, [{ ...pace, label: "" }]]);
  const groups = [
    ["gpu memory", "GPU memory", sizeWords, [["gpu_allocated_bytes", "allocated"], ["gpu_reserved_bytes", "reserved"], ["gpu_peak_bytes", "peak"]]],
    ["host memory", "Host memory", sizeWords, [["host_bytes", ""]]],
    ["shares", "GPU busy, waiting for data", share, [["gpu_utilization", "GPU busy"], ["data_wait", "waiting"]]],
    ["power", "GPU power", (watts) => `${num(watts)} W`, [["gpu_power_w", ""]]],
  ];
  for (const [key, title, format, names] of groups) {
    const lines = together(machine, names);
    if (lines.length > 1 || !lines[0]?.label) lines.length && found.push([key, title, format, lines]);
    else found.push([key, key === "shares" ? "Waiting for data" : title, format, [{ ...lines[0], label: "" }]]);
  }
  return found;
}

export class Charts {
  constructor(node) {
    this.node = node;
    this.charts = new Map();
  }

  update(data) {
    const shown = wanted(data);
    const keys = new Set(shown.map(([key]) => key));
    let order = false;
    for (const [key, chart] of this.charts) {
      if (keys.has(key)) continue;
      chart.destroy();
      this.charts.delete(key);
      order = true;
    }
    for (const [at, [key, title, format]] of shown.entries()) {
      if (this.charts.has(key)) continue;
      this.charts.set(key, new Chart(title, { format, tall: at === 0 }));
      order = true;
    }
    if (order) fill(this.node, shown.map(([key]) => this.charts.get(key).node));
    for (const [key, , , lines] of shown) this.charts.get(key).update(lines, data.bands, data.status.step);
    return shown.length;
  }

  recolour() {
    for (const chart of this.charts.values()) {
      if (!chart.plot) continue;
      chart.build();
      chart.tellLatest();
    }
  }
}
