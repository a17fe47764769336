// Inline Markdown: emphasis, code, links. Elements are created one by one and text is inserted as text nodes, so HTML
// in a model's answer has no effect. The cost is bounded for hostile texts: no search repeats a part of the text unless
// its result is cached, and nesting is limited.

import { element } from "./dom.js";
import { formula } from "./formula.js";
import { MAX_ADDRESS, Targets } from "./targets.js";

const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPACE = /[\s\u00a0]/u;
const CJK = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPECIAL = /[\\`*_~[!<&\n$hH]/g;
const BARE_ADDRESS = /https?:\/\/[^\s<>"'`]+/iy;
const ANGLE_ADDRESS = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const LINE_BREAK_TAG = /<br\s{0,9}\/?>/iy;
const ENTITY = /&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|([a-z]{2,8}));/iy;
const ENTITIES = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  reg: "®",
  hellip: "…",
  mdash: "—",
  ndash: "–",
  times: "×",
  deg: "°",
  rarr: "→",
  larr: "←",
  le: "≤",
  ge: "≥",
  ne: "≠",
  bull: "•",
  middot: "·",
};
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const PRICE = /^\d[\d.,]*\s+\p{L}{2,}/u;
const VARIABLE = /^\{?[A-Z_]{2,}/;
const CODE_OR_GAP = /`|\n[ \t]*\n/;
const MAX_OPEN = 48;
/** Maximum number of open delimiter runs, which limits the depth of elements. */

/**
 * The URL of a link if it is allowed, or null. Only absolute URLs with safe schemes are allowed: a relative one would
 * lead to a page of this server.
 */
export function safeAddress(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return SCHEMES.has(url.protocol) ? url.href : null;
}

/** A link to another site, without a referrer or access to this page. */
export function link(address, ...children) {
  return element(
    "a",
    { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address },
    children,
  );
}

/**
 * Renders a text.
 *
 * @param {string} text Markdown of a paragraph, heading or cell.
 * @param {Node} parent Node to append to.
 * @param {boolean} hasLinks Whether links are allowed; false within links.
 */
export function renderInline(text, parent, hasLinks = true) {
  new Inline(text, parent, hasLinks).run();
}

class Inline {
  #text;
  #parent;
  #hasLinks;
  #at = 0;
  #pending = "";
  /** Delimiter runs that may still open emphasis: {node, char, count, original, canClose}. */
  #open = [];
  /** Positions of closing brackets by opening ones; computed at the first bracket. */
  #brackets = null;
  /** Starts of backtick runs by length; computed at the first run. */
  #ticks = null;
  /** Closing delimiters of formulas that are known not to occur in the rest of the text. */
  #missing = new Set();
  /** Parser for link targets; created at the first link. */
  #targets = null;

  constructor(text, parent, hasLinks) {
    this.#text = text;
    this.#parent = parent;
    this.#hasLinks = hasLinks;
  }

  run() {
    const text = this.#text;
    while (this.#at < text.length) {
      SPECIAL.lastIndex = this.#at;
      const match = SPECIAL.exec(text);
      const next = match === null ? text.length : match.index;
      this.#pending += text.slice(this.#at, next);
      this.#at = next;
      if (match !== null && !this.#take(match[0])) {
        this.#pending += match[0];
        this.#at++;
      }
    }
    this.#flush();
  }

  /** Handles a special character at the current position; returns false if it has no special meaning there. */
  #take(char) {
    switch (char) {
      case "\\":
        return this.#formula("\\(", "\\)") || this.#formula("\\[", "\\]") || this.#escape();
      case "$":
        return this.#formula("$$", "$$") || this.#dollars();
      case "`":
        return this.#code();
      case "*":
      case "_":
      case "~":
        return this.#delimiter(char);
      case "[":
        return this.#link(this.#at, false);
      case "!":
        return this.#text[this.#at + 1] === "[" && this.#link(this.#at + 1, true);
      case "<":
        return this.#angle();
      case "&":
        return this.#entity();
      case "\n":
        this.#pending = this.#pending.replace(/ {1,99}$/, "");
        this.#add(element("br"));
        this.#at++;
        return true;
      default:
        return this.#bareAddress();
    }
  }

  #flush() {
    if (this.#pending !== "") this.#parent.append(this.#pending);
    this.#pending = "";
  }

  #add(node) {
    this.#flush();
    this.#parent.append(node);
  }

  #escape() {
    const next = this.#text[this.#at + 1];
    if (next === "\n") {
      this.#at++; // the line break follows
      return true;
    }
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.#pending += next;
    this.#at += 2;
    return true;
  }

  /** A formula between delimiters. Its content is not parsed as Markdown. */
  #formula(start, end) {
    if (!this.#text.startsWith(start, this.#at) || this.#missing.has(end)) return false;
    const close = this.#text.indexOf(end, this.#at + start.length);
    if (close < 0) {
      this.#missing.add(end);
      return false;
    }
    const body = this.#text.slice(this.#at + start.length, close).trim();
    if (body === "") return false;
    this.#add(formula(body, start !== "\\("));
    this.#at = close + end.length;
    return true;
  }

  /**
   * A formula between single dollar signs. Since these often mean prices, a formula must not begin or end with a space,
   * follow a letter, precede a digit, or begin with a number and a word: "US$5-$10", "$5 and $6", "$5 or less, not 6$".
   */
  #dollars() {
    const text = this.#text;
    const first = this.#at + 1;
    if (this.#missing.has("$") || first >= text.length || SPACE.test(text[first]) || text[first] === "$") return false;
    if (/[\p{L}\p{N}]/u.test(text[this.#at - 1] ?? "")) return false;
    let close = text.indexOf("$", first);
    while (close > 0 && isEscaped(text, close)) close = text.indexOf("$", close + 1);
    if (close < 0) {
      this.#missing.add("$");
      return false;
    }
    const body = text.slice(first, close);
    const next = text[close + 1] ?? "";
    if (SPACE.test(body.at(-1)) || /\d/.test(next) || (VARIABLE.test(body) && /\p{L}/u.test(next))) return false;
    if (PRICE.test(body) || CODE_OR_GAP.test(body)) return false;
    this.#add(formula(body, false));
    this.#at = close + 1;
    return true;
  }

  #code() {
    const text = this.#text;
    const length = runLength(text, this.#at);
    this.#ticks ??= backtickRuns(text);
    const starts = this.#ticks.get(length) ?? [];
    while (starts.length > 0 && starts[0] <= this.#at) starts.shift();
    if (starts.length === 0) {
      this.#pending += text.slice(this.#at, this.#at + length);
      this.#at += length;
      return true;
    }
    let body = text.slice(this.#at + length, starts[0]).replaceAll("\n", " ");
    if (body.startsWith(" ") && body.endsWith(" ") && body.trim() !== "") body = body.slice(1, -1);
    this.#add(element("code", {}, body));
    this.#at = starts[0] + length;
    return true;
  }

  #angle() {
    const text = this.#text;
    const match = matchAt(ANGLE_ADDRESS, text, this.#at);
    if (match !== null && this.#hasLinks) {
      const address = safeAddress(match[1]);
      if (address === null) return false;
      this.#add(link(address, match[1].replace(/^mailto:/i, "")));
      this.#at += match[0].length;
      return true;
    }
    const lineBreak = matchAt(LINE_BREAK_TAG, text, this.#at); // the only HTML tag that models use for formatting
    if (lineBreak === null) return false;
    this.#add(element("br"));
    this.#at += lineBreak[0].length;
    return true;
  }

  #entity() {
    const match = matchAt(ENTITY, this.#text, this.#at);
    if (match === null) return false;
    let char;
    if (match[3] !== undefined) {
      char = Object.hasOwn(ENTITIES, match[3]) ? ENTITIES[match[3]] : undefined;
    } else {
      const code = match[1] !== undefined ? parseInt(match[1], 10) : parseInt(match[2], 16);
      char = code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
    }
    if (char === undefined) return false;
    this.#pending += char;
    this.#at += match[0].length;
    return true;
  }

  #bareAddress() {
    if (!this.#hasLinks || /[\p{L}\p{N}]$/u.test(this.#pending.slice(-2))) return false;
    const match = matchAt(BARE_ADDRESS, this.#text, this.#at);
    if (match === null) return false;
    const text = withoutTail(match[0].slice(0, MAX_ADDRESS));
    const address = safeAddress(text);
    if (address === null) return false;
    this.#add(link(address, text));
    this.#at += text.length;
    return true;
  }

  #link(bracket, isImage) {
    const text = this.#text;
    this.#brackets ??= matchBrackets(text);
    const close = this.#brackets.get(bracket);
    if (close === undefined || text[close + 1] !== "(") return false;
    if (!this.#hasLinks && !isImage) return false;
    this.#targets ??= new Targets(text);
    const target = this.#targets.at(close + 2);
    if (target === null) return false;
    const label = text.slice(bracket + 1, close);
    this.#add(isImage ? this.#image(label, target.address) : this.#anchor(label, target.address));
    this.#at = target.end;
    return true;
  }

  #anchor(label, target) {
    const address = safeAddress(target);
    const node = address === null ? element("span") : link(address);
    renderInline(label, node, false);
    if (node.textContent.trim() === "") node.append(target);
    return node;
  }

  /** Shows an image as a link. Images are not fetched, since their URLs could leak the conversation. */
  #image(label, target) {
    const name = label.trim() || "picture";
    const address = this.#hasLinks ? safeAddress(target) : null;
    return address === null ? element("span", {}, name) : link(address, name);
  }

  // -- emphasis ------------------------------------------------------------------------------------------------

  #delimiter(char) {
    const text = this.#text;
    const start = this.#at;
    let end = start;
    while (text[end] === char) end++;
    const count = end - start;
    this.#at = end;
    const { canOpen, canClose } = flanking(text, start, end, char);
    if ((char === "~" && count !== 2) || count > 3 || !(canOpen || canClose)) {
      this.#pending += text.slice(start, end);
      return true;
    }
    let left = count;
    if (canClose) left = this.#close(char, count, canOpen);
    if (left === 0) return true;
    if (!canOpen) {
      this.#pending += char.repeat(left);
      return true;
    }
    this.#flush();
    const node = document.createTextNode(char.repeat(left));
    this.#parent.append(node);
    this.#open.push({ node, char, count: left, original: count, canClose });
    if (this.#open.length > MAX_OPEN) this.#open.shift(); // the oldest run remains text
    return true;
  }

  /** Closes as much emphasis as a delimiter run can; returns how many of its characters are left. */
  #close(char, count, canOpen) {
    let left = count;
    for (let i = this.#open.length - 1; i >= 0 && left > 0; i--) {
      const opener = this.#open[i];
      if (opener.char !== char) continue;
      // CommonMark's "rule of 3": if a run can both open and close, the lengths must not add up to a multiple of 3,
      // unless both are multiples of 3.
      const both = canOpen || opener.canClose;
      const sum = opener.original + count;
      if (both && sum % 3 === 0 && (opener.original % 3 !== 0 || count % 3 !== 0)) continue;
      this.#open.length = i + 1; // delimiters opened in between remain text
      while (left > 0 && opener.count > 0) {
        const size = char === "~" || (left >= 2 && opener.count >= 2) ? 2 : 1;
        this.#wrap(opener, char === "~" ? "del" : size === 2 ? "strong" : "em", size);
        left -= size;
      }
      if (opener.count === 0) this.#open.pop();
    }
    return left;
  }

  #wrap(opener, tag, size) {
    this.#flush();
    const node = element(tag);
    while (opener.node.nextSibling !== null) node.append(opener.node.nextSibling);
    opener.count -= size;
    opener.node.data = opener.char.repeat(opener.count);
    this.#parent.append(node);
  }
}

/** Whether a delimiter run may open or close emphasis, depending on the characters next to it. */
function flanking(text, start, end, char) {
  const before = start === 0 ? " " : charBefore(text, start);
  const after = end === text.length ? " " : String.fromCodePoint(text.codePointAt(end));
  const [spaceBefore, spaceAfter] = [SPACE.test(before), SPACE.test(after)];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  // In scripts without spaces, emphasis may touch letters as well as punctuation.
  const isLeft = !spaceAfter && (!markAfter || spaceBefore || markBefore || CJK.test(before));
  const isRight = !spaceBefore && (!markBefore || spaceAfter || markAfter || CJK.test(after));
  if (char !== "_") return { canOpen: isLeft, canClose: isRight };
  return { canOpen: isLeft && (!isRight || markBefore), canClose: isRight && (!isLeft || markAfter) };
}

function charBefore(text, index) {
  const low = text.charCodeAt(index - 1);
  return low >= 0xdc00 && low <= 0xdfff && index >= 2 ? text.slice(index - 2, index) : text[index - 1];
}

function matchAt(regex, text, index) {
  regex.lastIndex = index;
  return regex.exec(text);
}

function runLength(text, start) {
  let end = start;
  while (text[end] === "`") end++;
  return end - start;
}

function backtickRuns(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    const starts = runs.get(match[0].length);
    if (starts === undefined) runs.set(match[0].length, [match.index]);
    else starts.push(match.index);
  }
  return runs;
}

/** Finds matching brackets in one pass, ignoring those in code or after a backslash. */
function matchBrackets(text) {
  const pairs = new Map();
  const open = [];
  for (let i = 0; i < text.length; i++) {
    const char = text[i];
    if (char === "\\") i++;
    else if (char === "`") i = skipCode(text, i);
    else if (char === "[") open.push(i);
    else if (char === "]" && open.length > 0) pairs.set(open.pop(), i);
  }
  return pairs;
}

function skipCode(text, start) {
  const length = runLength(text, start);
  if (length > 3) return start + length - 1; // rare, so its end is not searched for
  const close = text.indexOf("`".repeat(length), start + length);
  return close < 0 || close - start > MAX_ADDRESS ? start + length - 1 : close + length - 1;
}

/** Whether an odd number of backslashes precedes a position. */
function isEscaped(text, index) {
  let start = index;
  while (text[start - 1] === "\\") start--;
  return (index - start) % 2 === 1;
}

/** A bare URL, without trailing punctuation that belongs to the sentence. */
function withoutTail(text) {
  let end = text.length;
  for (; end > 0; end--) {
    const char = text[end - 1];
    if (char === ")") {
      const body = text.slice(0, end);
      if (body.split("(").length >= body.split(")").length) break;
    } else if (!/[.,;:!?*_~\]}|]/.test(char)) {
      break;
    }
  }
  return text.slice(0, end);
}
