// One chart: lines over the steps of a run, with its links as bands behind them.

import { h } from "./dom.js";
import { num, whole } from "./words.js";
import { colour } from "./theme.js";

const NOISY = 8; // Ups and downs, in multiples of the range, from which on a line is smoothed.
const KERNEL = 0.018; // Of the points that are shown.
const FONT = "11px system-ui, sans-serif";

// A straight line through the neighbours of each point, the nearest of which count most: nothing is
// shifted, and the ends bend no more than the middle.
function smoothed(values) {
  const sigma = Math.max(1, values.length * KERNEL);
  const reach = Math.ceil(sigma * 3);
  const weights = Array.from({ length: reach + 1 }, (_, i) => Math.exp(-(i * i) / (2 * sigma * sigma)));
  return values.map((value, at) => {
    if (value === null) return null;
    let [sum, sumX, sumXX, sumY, sumXY] = [0, 0, 0, 0, 0];
    for (let i = Math.max(0, at - reach); i <= Math.min(values.length - 1, at + reach); i++) {
      if (values[i] === null) continue;
      const x = i - at;
      const weight = weights[Math.abs(x)];
      sum += weight;
      sumX += weight * x;
      sumXX += weight * x * x;
      sumY += weight * values[i];
      sumXY += weight * x * values[i];
    }
    const spread = sum * sumXX - sumX * sumX;
    return spread > 1e-9 ? (sumXX * sumY - sumX * sumXY) / spread : sumY / sum;
  });
}

function isNoisy(values) {
  let low = Infinity;
  let high = -Infinity;
  let way = 0;
  let before = null;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
    if (before !== null) way += Math.abs(value - before);
    before = value;
  }
  return values.length > 60 && way > NOISY * (high - low);
}

const clear = (css, alpha) => {
  const [r, g, b] = css.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
  return `rgba(${r},${g},${b},${alpha})`;
};

export class Chart {
  // `format` puts a value into words; lines are named where there are several.
  constructor(title, { format = num, tall = false } = {}) {
    this.format = format;
    this.logarithmic = false;
    this.readout = h("span", { class: "readout" });
    this.log = h("button", { type: "button", class: "quiet small", "aria-pressed": "false", onclick: () => this.toggleLog() }, "log");
    this.host = h("div", { class: `plot${tall ? " tall" : ""}`, tabindex: "0", role: "img", onkeydown: (event) => this.key(event) });
    this.node = h("figure", { class: tall ? "chart wide" : "chart" }, h("figcaption", {}, h("b", {}, title), this.readout, this.log), this.host);
    this.title = title;
    this.plot = null;
    this.shape = "";
    this.zoomed = false;
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.host);
  }

  // lines: [{label, steps, mean, low?, high?, bad?, latest}], all over the same steps.
  update(lines, bands, step) {
    this.lines = lines;
    this.bands = bands;
    const data = [lines[0].steps];
    const kinds = [];
    for (const line of lines) {
      const positive = (values) => (this.logarithmic ? values.map((v) => (v > 0 ? v : null)) : values);
      const noisy = lines.length === 1 && isNoisy(line.mean);
      data.push(positive(line.mean));
      kinds.push(noisy ? "faint" : "line");
      if (noisy) {
        data.push(positive(smoothed(line.mean)));
        kinds.push("line");
      }
      if (line.high && lines.length === 1) {
        data.push(positive(line.high), positive(line.low));
        kinds.push("high", "low");
      }
    }
    this.data = data;
    this.kinds = kinds;
    this.last = Math.max(step, data[0].at(-1) ?? 0, ...lines.flatMap((line) => line.bad ?? []));
    const shape = `${kinds} ${this.logarithmic}`;
    if (this.plot === null || shape !== this.shape) this.build(shape);
    else {
      this.plot.setData(data, !this.zoomed);
      if (this.zoomed) this.plot.redraw();
    }
    if (this.plot.cursor.idx === null || this.plot.cursor.idx === undefined) this.tellLatest();
    const latest = lines.map((line) => `${line.label ? `${line.label} ` : ""}${line.latest ? this.format(line.latest[1]) : "none"}`).join(", ");
    this.host.setAttribute("aria-label", `${this.title}: ${latest} at step ${this.last}. Left and right arrows read single points.`);
  }

  build(shape = this.shape) {
    this.shape = shape;
    this.plot?.destroy();
    const inks = ["one", "two", "three", "four"].map(colour);
    const text = colour("dim");
    const line = colour("line");
    let ink = -1;
    const series = this.kinds.map((kind) => {
      if (kind === "faint" || (kind === "line" && this.kinds[ink] !== "faint")) ink += 1;
      const stroke = inks[Math.min(Math.max(ink, 0), inks.length - 1)];
      if (kind === "faint") return { stroke: clear(stroke, 0.3), width: 1, points: { show: false } };
      if (kind === "line") return { stroke, width: 1.75, spanGaps: true, points: { show: this.data[0].length < 2, size: 6 } };
      return { stroke: clear(stroke, 0), width: 0, points: { show: false } };
    });
    if (this.kinds.includes("faint")) series[1] = { ...series[1], stroke: inks[0] };
    this.inks = inks;
    const high = this.kinds.indexOf("high");
    const axis = { stroke: text, font: FONT, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    const options = {
      ...this.size(),
      padding: [14, 8, 0, 0],
      series: [{}, ...series],
      bands: high < 0 ? [] : [{ series: [high + 1, high + 2], fill: clear(inks[0], 0.14) }],
      legend: { show: false },
      scales: {
        x: { time: false, range: (u, low, upper) => (this.zoomed ? [low, upper] : [Math.min(0, low ?? 0), Math.max(this.last, 1)]) },
        y: { distr: this.logarithmic ? 3 : 1 },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 28, space: 64, incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7, 8].map((e) => n * 10 ** e)).sort((a, b) => a - b), values: (u, ticks) => ticks.map((v) => (v >= 1e6 ? num(v) : whole(v))) },
        { ...axis, size: (u, words) => 16 + 6 * Math.max(3, ...(words ?? []).map((word) => word.length)), space: 34, values: (u, ticks) => ticks.map((v) => (v === null ? "" : this.format(v))) },
      ],
      cursor: { sync: { key: "steps", scales: ["x", null] }, y: false, points: { size: 7, width: 2 }, drag: { x: true, y: false, setScale: true }, focus: { prox: -1 } },
      hooks: {
        drawClear: [(u) => this.drawBands(u)],
        draw: [(u) => this.drawBad(u)],
        setCursor: [(u) => this.tell(u.cursor.idx)],
        setSelect: [(u) => (this.zoomed = u.select.width > 0)],
      },
    };
    this.plot = new uPlot(options, this.data, this.host);
    this.plot.over.addEventListener("dblclick", () => this.reset());
  }

  size() {
    return { width: Math.max(200, this.host.clientWidth), height: this.host.clientHeight || 180 };
  }

  resize() {
    if (this.plot && this.host.clientWidth && (this.plot.width !== this.size().width || this.plot.height !== this.size().height)) this.plot.setSize(this.size());
  }

  reset() {
    this.zoomed = false;
    this.plot.setData(this.data, true);
  }

  toggleLog() {
    this.logarithmic = !this.logarithmic;
    this.log.setAttribute("aria-pressed", String(this.logarithmic));
    this.update(this.lines, this.bands, this.last);
  }

  destroy() {
    this.sizes.disconnect();
    this.plot?.destroy();
  }

  drawBands(u) {
    const { ctx } = u;
    const { left, top, width, height } = u.bbox;
    const ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.font = `${10 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.textBaseline = "bottom";
    let named = -Infinity;
    for (const [link, from, upto] of this.bands) {
      const begin = Math.max(left, u.valToPos(from, "x", true));
      const end = Math.min(left + width, u.valToPos(upto, "x", true));
      if (end <= begin) continue;
      if (link % 2 === 0) {
        ctx.fillStyle = colour("band");
        ctx.fillRect(begin, top, end - begin, height);
      }
      const middle = (begin + end) / 2;
      const half = ctx.measureText(link).width / 2 + 3 * ratio;
      if (middle - half > named && end - begin > half) {
        ctx.fillStyle = colour("dim");
        ctx.fillText(link, middle, top - 2 * ratio);
        named = middle + half;
      }
    }
    ctx.restore();
  }

  // Steps in which the value was no number: a mark at the upper edge.
  drawBad(u) {
    const { ctx } = u;
    const { left, top, width } = u.bbox;
    const size = 4 * (devicePixelRatio || 1);
    ctx.save();
    ctx.fillStyle = colour("bad");
    for (const step of this.lines.flatMap((line) => line.bad ?? [])) {
      const x = u.valToPos(step, "x", true);
      if (x < left || x > left + width) continue;
      ctx.beginPath();
      ctx.moveTo(x - size, top);
      ctx.lineTo(x + size, top);
      ctx.lineTo(x, top + size * 1.8);
      ctx.fill();
    }
    ctx.restore();
  }

  tellLatest() {
    this.say(this.lines.map((line) => [line.label, line.latest?.[1] ?? null]), "");
  }

  tell(idx) {
    if (idx === null || idx === undefined) return this.tellLatest();
    const step = this.data[0][idx];
    const band = this.bands.find(([, from, upto]) => from < step && step <= upto);
    const place = `step ${whole(step)}${band ? ` · link ${band[0]}` : ""}`;
    this.say(this.lines.map((line) => [line.label, line.mean[idx]]), place);
  }

  say(values, place) {
    const shown = values.map(([label, value], at) => {
      const mark = label ? h("i", { class: "ink", style: { background: this.inks[at] } }) : "";
      return h("span", {}, mark, label ? `${label} ` : "", h("b", {}, value === null || value === undefined ? "–" : this.format(value)));
    });
    this.readout.replaceChildren(...(place ? [h("span", { class: "place" }, place)] : []), ...shown);
  }

  key(event) {
    const ways = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9 };
    if (event.key === "Escape") {
      this.reset();
      this.plot.setCursor({ left: -10, top: -10 });
    } else if (event.key in ways) {
      const last = this.data[0].length - 1;
      const at = Math.min(last, Math.max(0, (this.plot.cursor.idx ?? last) + ways[event.key]));
      this.plot.setCursor({ left: this.plot.valToPos(this.data[0][at], "x"), top: this.plot.over.clientHeight / 2 });
      event.preventDefault();
    }
  }
}
