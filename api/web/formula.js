// Formulas, set by KaTeX. It is fetched when the first one is shown; until then, and if it cannot be had or does not
// understand a formula, the source is shown.

import { element } from "./dom.js";

const MAX_CHARS = 4000;
const MAX_DEPTH = 90;
/** Of the elements of a formula. */
const MAX_KEPT = 300;
const OPTIONS = { throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 200 };

let katex = null;
let loading = null;
/** Formulas that were set, by source: while an answer grows, they are shown again and again. */
const kept = new Map();

/**
 * An element that shows a formula.
 *
 * @param {string} source TeX.
 * @param {boolean} isDisplay Whether it stands by itself.
 * @param {string} tag Name of the element.
 */
export function formula(source, isDisplay, tag = "span") {
  const node = element(tag, { class: isDisplay ? "formula block" : "formula", "data-source": source }, source);
  if (source.length > MAX_CHARS) return node;
  if (katex !== null) set(node, source, isDisplay);
  else
    load().then(
      () => set(node, source, isDisplay),
      () => {},
    );
  return node;
}

/** Fetches KaTeX, once; after a failure the next formula tries again. */
function load() {
  loading ??= fetchKatex().catch((error) => {
    loading = null;
    throw error;
  });
  return loading;
}

async function fetchKatex() {
  const styles = element("link", { rel: "stylesheet", href: new URL("katex.min.css", import.meta.url).href });
  document.head.append(styles);
  await import("./katex.min.js"); // a plain script, which leaves its name behind
  katex = globalThis.katex;
}

function set(node, source, isDisplay) {
  const key = `${isDisplay ? "d" : "i"}${source}`;
  let shown = kept.get(key);
  if (shown === undefined) {
    shown = typeset(source, isDisplay);
    if (kept.size >= MAX_KEPT) kept.delete(kept.keys().next().value);
    kept.set(key, shown);
  }
  if (shown === null) return;
  node.replaceChildren(shown.cloneNode(true));
  node.classList.add("is-set");
}

/** The elements of a formula, or null if there is something wrong with it. */
function typeset(source, isDisplay) {
  const place = element("span");
  try {
    katex.render(source, place, { ...OPTIONS, displayMode: isDisplay });
  } catch {
    return null;
  }
  const found = place.firstChild;
  return found === null || depthOf(found) > MAX_DEPTH ? null : found;
}

function depthOf(root) {
  let depth = 0;
  for (let level = [root]; level.length > 0 && depth <= MAX_DEPTH; depth++)
    level = level.flatMap((node) => [...node.children]);
  return depth;
}
