// Parses metrics in Prometheus text format, and computes rates and quantiles between two readings.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? +([^ ]+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

/** All samples of one reading. Values are aggregated over all labels, such as replicas and models. */
export class Reading {
  #samples = new Map();

  /**
   * @param {string} text Response of /metrics.
   * @param {number} time Time of the reading, in seconds.
   */
  constructor(text, time) {
    this.time = time;
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : SAMPLE.exec(line);
      if (match === null) continue;
      const [, name, labels, value] = match;
      const sample = { labels: parseLabels(labels), value: parseValue(value) };
      const known = this.#samples.get(name);
      if (known === undefined) this.#samples.set(name, [sample]);
      else known.push(sample);
    }
  }

  /** Samples of a metric: {labels, value}. */
  all(name) {
    return this.#samples.get(name) ?? [];
  }

  /** Sum of a metric, or NaN if there is none. */
  sum(name) {
    const samples = this.all(name);
    return samples.length === 0 ? NaN : samples.reduce((total, { value }) => total + value, 0);
  }

  /** Largest sample of a metric, or NaN. */
  max(name) {
    const samples = this.all(name);
    return samples.length === 0 ? NaN : Math.max(...samples.map(({ value }) => value));
  }

  /** Mean of a histogram's observations, or NaN. */
  mean(name) {
    return this.sum(`${name}_sum`) / this.sum(`${name}_count`);
  }

  /** A histogram as [upper bound, cumulative count], by increasing bound. */
  buckets(name) {
    const counts = new Map();
    for (const { labels, value } of this.all(`${name}_bucket`)) {
      const bound = parseValue(labels.le ?? "");
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([one], [other]) => one - other);
  }
}

function parseLabels(text) {
  const labels = {};
  for (const [, name, value] of (text ?? "").matchAll(LABEL)) {
    labels[name] = value.replace(/\\(.)/g, (whole, char) => ESCAPES[char] ?? whole);
  }
  return labels;
}

function parseValue(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/** Increase of a counter. If it has decreased, the server was restarted and the counter started at zero. */
export function increase(name, before, after) {
  const [old, now] = [before.sum(name), after.sum(name)];
  if (Number.isNaN(now)) return NaN;
  return Number.isNaN(old) || now < old ? now : now - old;
}

/** Increase of a counter per second. */
export function rate(name, before, after) {
  return increase(name, before, after) / (after.time - before.time);
}

/** The observations of a histogram between two readings. */
export function newBuckets(name, before, after) {
  const old = new Map(before.buckets(name));
  const now = after.buckets(name);
  const isRestart = now.some(([bound, count]) => count < (old.get(bound) ?? 0));
  return isRestart ? now : now.map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
}

/**
 * A quantile of a histogram, interpolated linearly within buckets as in Prometheus.
 *
 * @param {number} share The quantile, such as 0.95 for the 95th percentile.
 * @param {Array<[number, number]>} buckets
 * @returns {number} NaN for an empty histogram; the highest finite bound if the quantile is above it.
 */
export function quantile(share, buckets) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total === 0) return NaN;
  const wanted = share * total;
  const index = buckets.findIndex(([, count]) => count >= wanted);
  const [upper, count] = buckets[index];
  const [lower, below] = index === 0 ? [0, 0] : buckets[index - 1];
  if (upper === Infinity) return lower;
  return lower + ((upper - lower) * (wanted - below)) / (count - below);
}
