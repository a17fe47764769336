// A scrolling line plot over time. It is drawn as SVG, so that colours come from the style sheet and text is sharp.

import { element, svg } from "./dom.js";

const HEIGHT = 168;
const PAD = { left: 52, right: 10, top: 10, bottom: 22 };
const MAX_GAP = 4;
/** Seconds without a sample after which a line is interrupted. */

/** A plot of one to three lines. */
export class Plot {
  /** The element to show. */
  node;
  #title;
  #series;
  #format;
  #limit;
  #frame;
  #legend;
  #reader = element("output", { class: "plot-reader", hidden: true });
  #points = [];
  #span = 60;
  #now = 0;
  #width = 0;
  #cursor = null;
  /** Time selected by the pointer or the arrow keys. */

  /**
   * @param {object} options `title`; `note`; `series`: names of the lines; `format(value)`; `limit`: minimum upper end
   *   of the scale; `isShare`: the scale ends at 1.
   */
  constructor({ title, note, series, format, limit = 0, isShare = false }) {
    this.#title = title;
    this.#series = series;
    this.#format = format;
    this.#limit = isShare ? 1 : limit;
    this.#frame = svg("svg", { class: "plot", role: "img", "aria-label": title, height: HEIGHT, tabindex: "0" });
    this.#legend = series.map((name, i) => {
      const value = element("strong", {});
      return { value, node: element("span", { class: `key series-${i + 1}` }, element("i"), `${name} `, value) };
    });
    const head = element(
      "figcaption",
      {},
      element("h2", {}, title),
      element(
        "span",
        { class: "legend" },
        this.#legend.map(({ node }) => node),
      ),
    );
    const area = element("div", { class: "plot-area" }, this.#frame, this.#reader);
    this.node = element("figure", { class: "card" }, head, area, element("p", { class: "quiet small" }, note));
    this.#listen();
    new ResizeObserver(([entry]) => {
      this.#width = Math.round(entry.contentRect.width);
      this.#draw();
    }).observe(area);
  }

  /**
   * @param {Array<{time: number, values: number[]}>} points By increasing time; NaN: no value.
   * @param {number} span Seconds to show.
   * @param {number} now Time at the right edge.
   */
  update(points, span, now) {
    this.#points = points.filter(({ time }) => time >= now - span - MAX_GAP);
    this.#span = span;
    this.#now = now;
    const texts = this.#series.map((name, i) => {
      const text = this.#format(lastValue(this.#points, i));
      this.#legend[i].value.textContent = text;
      return `${name} ${text}`;
    });
    this.#frame.setAttribute("aria-label", `${this.#title}: ${texts.join(", ")}`);
    this.#draw();
  }

  #listen() {
    const frame = this.#frame;
    frame.addEventListener("pointermove", (event) => {
      this.#point(this.#now - this.#span + ((event.offsetX - PAD.left) / this.#plotWidth) * this.#span);
    });
    frame.addEventListener("pointerleave", () => this.#point(null));
    frame.addEventListener("blur", () => this.#point(null));
    frame.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      this.#point((this.#cursor ?? this.#now) + step);
    });
  }

  #point(time) {
    this.#cursor = time === null ? null : Math.min(this.#now, Math.max(this.#now - this.#span, time));
    this.#draw();
  }

  get #plotWidth() {
    return Math.max(1, this.#width - PAD.left - PAD.right);
  }

  #x(time) {
    return PAD.left + ((time - this.#now + this.#span) / this.#span) * this.#plotWidth;
  }

  #draw() {
    if (this.#width === 0) return;
    const values = this.#points.flatMap((point) => point.values).filter(Number.isFinite);
    const { top, ticks } = scale(Math.max(this.#limit, ...values));
    const y = (value) => HEIGHT - PAD.bottom - (value / top) * (HEIGHT - PAD.top - PAD.bottom);
    const right = this.#width - PAD.right;
    const grid = ticks.map((tick) => [
      svg("line", { class: tick === 0 ? "axis" : "grid", x1: PAD.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: PAD.left - 8, y: y(tick) + 4, "text-anchor": "end" }, this.#format(tick)),
    ]);
    const lines = this.#series.map((_, i) => {
      const path = svg("path", { class: `line series-${i + 1}`, d: this.#path(i, y) });
      const last = this.#points.at(-1);
      const value = last?.values[i];
      if (!Number.isFinite(value)) return path;
      return [path, svg("circle", { class: `dot series-${i + 1}`, cx: this.#x(last.time), cy: y(value), r: 2.5 })];
    });
    this.#frame.setAttribute("width", this.#width);
    this.#frame.replaceChildren();
    for (const node of [grid, this.#times(), lines, this.#crosshair(y)].flat(3)) if (node) this.#frame.append(node);
  }

  #path(series, y) {
    let path = "";
    let before = null;
    for (const { time, values } of this.#points) {
      const value = values[series];
      if (!Number.isFinite(value)) {
        before = null;
        continue;
      }
      const isGap = before === null || time - before > MAX_GAP;
      path += `${isGap ? "M" : "L"}${Math.max(PAD.left, this.#x(time)).toFixed(1)} ${y(value).toFixed(1)}`;
      before = time;
    }
    return path;
  }

  #times() {
    const label = (time, text, anchor) => svg("text", { x: this.#x(time), y: HEIGHT - 4, "text-anchor": anchor }, text);
    const half = this.#span / 2;
    return [
      label(this.#now - this.#span, `−${ago(this.#span)}`, "start"),
      label(this.#now - half, `−${ago(half)}`, "middle"),
      label(this.#now, "now", "end"),
    ];
  }

  /** Shows a line at the selected sample, and its values as text. */
  #crosshair(y) {
    const point = this.#cursor === null ? null : nearest(this.#points, this.#cursor);
    this.#reader.hidden = point === null;
    if (point === null) return null;
    const x = Math.max(PAD.left, this.#x(point.time));
    const texts = this.#series.map((name, i) => `${name} ${this.#format(point.values[i])}`);
    this.#reader.textContent = `${ago(Math.max(0, this.#now - point.time))} ago: ${texts.join(", ")}`;
    this.#reader.classList.toggle("is-left", x > this.#width / 2);
    const dots = point.values.map((value, i) =>
      Number.isFinite(value) ? svg("circle", { class: `dot series-${i + 1}`, cx: x, cy: y(value), r: 3.5 }) : null,
    );
    return [svg("line", { class: "crosshair", x1: x, x2: x, y1: PAD.top, y2: HEIGHT - PAD.bottom }), ...dots];
  }
}

/** Round numbers from 0 to at least a maximum. */
function scale(maximum) {
  const rough = (maximum > 0 ? maximum : 1) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const count = Math.max(1, Math.ceil((maximum / step) * 0.999));
  return { top: count * step, ticks: Array.from({ length: count + 1 }, (_, i) => i * step) };
}

function lastValue(points, series) {
  return points.at(-1)?.values[series] ?? NaN;
}

function nearest(points, time) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point.time - time) < Math.abs(best.time - time)) best = point;
  }
  return best;
}

function ago(span) {
  return span < 120 ? `${Math.round(span)} s` : `${Number((span / 60).toFixed(1))} min`;
}
