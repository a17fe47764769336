// Metrics in Prometheus' text format: reading them, and what follows from two readings.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? +([^ ]+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

/** All samples of one reading. Sums are over labels: several replicas, or models, count together. */
export class Reading {
  #samples = new Map();

  /**
   * @param {string} text What /metrics says.
   * @param {number} time When, in seconds.
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

  /** Mean of what a histogram counted, or NaN. */
  mean(name) {
    return this.sum(`${name}_sum`) / this.sum(`${name}_count`);
  }

  /** A histogram as [upper bound, count of what is not above it], by rising bound. */
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

/** How much a counter grew. One that shrank belongs to a server that was started again, and counts from zero. */
export function increase(name, before, after) {
  const [old, now] = [before.sum(name), after.sum(name)];
  if (Number.isNaN(now)) return NaN;
  return Number.isNaN(old) || now < old ? now : now - old;
}

/** How fast a counter grew, per second. */
export function rate(name, before, after) {
  return increase(name, before, after) / (after.time - before.time);
}

/** What came into a histogram between two readings. */
export function newBuckets(name, before, after) {
  const old = new Map(before.buckets(name));
  const now = after.buckets(name);
  const isRestart = now.some(([bound, count]) => count < (old.get(bound) ?? 0));
  return isRestart ? now : now.map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
}

/**
 * A quantile of a histogram: within a bucket values are taken to be spread evenly, as Prometheus does it.
 *
 * @param {number} share 0.95 for the 95th percentile.
 * @param {Array<[number, number]>} buckets
 * @returns {number} NaN of an empty histogram; the highest finite bound if it lies above.
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
