// Formulas, rendered by KaTeX, which is loaded when the first formula is shown. Until it has loaded, and if it fails to
// load or to parse a formula, the source is shown.

import { element } from "./dom.js";

const MAX_CHARS = 4000;
const MAX_DEPTH = 90;
/** Maximum depth of a formula's elements. */
const MAX_KEPT = 300;
const OPTIONS = { throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 200 };

let katex = null;
let loading = null;
/** Cache of rendered formulas by source, since they are shown repeatedly while an answer grows. */
const kept = new Map();

/**
 * An element that shows a formula.
 *
 * @param {string} source TeX.
 * @param {boolean} isDisplay Whether it is a display formula, not an inline one.
 * @param {string} tag Tag name of the element.
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

/** Loads KaTeX once; after a failure, the next formula retries. */
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
  await import("./katex.min.js"); // a classic script, which defines a global
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

/** The elements of a formula, or null if it is invalid or nested too deeply. */
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
