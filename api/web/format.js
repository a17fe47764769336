// Formats numbers and times for display. Units are preceded by a non-breaking space.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** About 3 significant digits: 0.42, 4.2, 42, 4,242. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return whole.format(value);
  return value.toFixed(size >= 10 ? 1 : 2);
}

/** 1.2K, 3.4M. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  return Math.abs(value) < 1000 ? number(value) : compact.format(value);
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const value = share * 100;
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1)}\u00a0%`;
}

/** Seconds as 320 µs, 42 ms, 1.30 s, 2 min 5 s. */
export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (value < 0.001) return `${Math.round(value * 1e6)}\u00a0µs`;
  if (value < 0.1) return `${Number((value * 1000).toPrecision(2))}\u00a0ms`;
  if (value < 1) return `${Math.round(value * 1000)}\u00a0ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)}\u00a0s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)}\u00a0s`;
}

/** Time ago, for a list: now, 5 min, 3 h, Tue, 4 Mar. */
export function age(then, now = Date.now()) {
  const minutes = Math.floor((now - then) / 60000);
  if (minutes < 1) return "now";
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h`;
  const options = minutes < 6 * 24 * 60 ? { weekday: "short" } : { day: "numeric", month: "short" };
  return new Intl.DateTimeFormat("en-GB", options).format(then);
}

/** Singular or plural, depending on a count. */
export function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}
