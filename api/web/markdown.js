// An incremental Markdown view. Text is split into blocks; when it grows, only changed blocks are rebuilt, usually the
// last one. So the cost per token does not grow with the answer, and selections in earlier blocks are kept.

import { copyButton, element } from "./dom.js";
import { formula } from "./formula.js";
import { highlight } from "./highlight.js";
import { renderInline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const INDENTED = /^(?: {4}|\t)/;
const UNDERLINE = /^ {0,3}(=+|-{2,})[ \t]*$/;
const FORMULA = { $$: "$$", "\\[": "\\]" };
const MAX_DEPTH = 8;
/** Maximum nesting of quotes and lists; deeper ones are shown as plain text. */

/** Renders Markdown in an element. */
export class MarkdownView {
  #root;
  #shown = [];

  constructor(root) {
    this.#root = root;
  }

  /** Shows a text, reusing the unchanged blocks of the previous one. */
  update(text) {
    const blocks = parseBlocks(text);
    const shown = this.#shown;
    let same = 0;
    while (same < shown.length && same < blocks.length && isSame(shown[same].block, blocks[same])) same++;
    if (same === shown.length - 1 && same < blocks.length && shown[same].grow?.(blocks[same])) {
      shown[same].block = blocks[same];
      same++;
    }
    for (const old of shown.splice(same)) old.node.remove();
    for (const block of blocks.slice(same)) {
      const view = renderBlock(block, 0);
      shown.push({ block, ...view });
      this.#root.append(view.node);
    }
  }
}

function isSame(one, other) {
  return one.kind === other.kind && one.isClosed === other.isClosed && one.source === other.source;
}

// -- parsing blocks --------------------------------------------------------------------------------------------

/**
 * Splits a text into blocks. Blocks nested in lists and quotes are parsed when those are rendered.
 *
 * @returns {Array<{kind: string, lines: string[], source: string}>} Kinds: code, heading, rule, quote, list, table,
 *   formula, paragraph.
 */
export function parseBlocks(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const block = takeBlock(lines, at);
    block.source = lines.slice(at, block.end).join("\n");
    at = block.end;
    blocks.push(block);
  }
  return blocks;
}

function takeBlock(lines, at) {
  const line = lines[at];
  const fence = matchFence(line);
  if (fence !== null) return takeFence(lines, at, fence);
  if (HEADING.test(line)) return takeHeading(line, at);
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (QUOTE.test(line)) return takeQuote(lines, at);
  if (ITEM.test(line)) return takeList(lines, at);
  if (INDENTED.test(line)) return takeIndented(lines, at);
  return takeFormula(lines, at) ?? takeTable(lines, at) ?? takeParagraph(lines, at);
}

/** The fence that a line opens, or null. A line with further backticks is inline code, not a fence. */
function matchFence(line) {
  const match = FENCE.exec(line);
  if (match === null) return null;
  const [head, indent, marks] = match;
  const info = line.slice(head.length);
  if (marks[0] === "`" && info.includes("`")) return null;
  return { indent, marks, language: info.trim().split(/\s/, 1)[0] };
}

function takeFence(lines, at, { indent, marks, language }) {
  const close = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const body = lines.slice(at + 1, end).map((line) => withoutIndent(line, indent.length));
  const isClosed = end < lines.length;
  return { kind: "code", language, text: body.join("\n"), isClosed, end: isClosed ? end + 1 : end };
}

function takeHeading(line, at) {
  const marks = HEADING.exec(line)[1];
  let text = line.trim().slice(marks.length).trim();
  const closing = /(^|[ \t])#{1,99}$/.exec(text.slice(-100));
  if (closing !== null) text = text.slice(0, text.length - closing[0].length).trim();
  return { kind: "heading", level: marks.length, text, end: at + 1 };
}

function takeQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return { kind: "quote", inner, end };
}

function takeIndented(lines, at) {
  let end = at;
  let last = at;
  for (; end < lines.length; end++) {
    if (INDENTED.test(lines[end])) last = end;
    else if (lines[end].trim() !== "") break;
  }
  const text = lines.slice(at, last + 1).map((line) => withoutIndent(line, 4));
  return { kind: "code", language: "", text: text.join("\n"), isClosed: true, end: last + 1 };
}

/** Items with the same kind of marker. An item continues over indented lines, and over others until a blank line. */
function takeList(lines, at) {
  const first = ITEM.exec(lines[at]);
  const mark = first[2].at(-1);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (match === null || match[2].at(-1) !== mark || RULE.test(lines[end])) break;
    const item = takeItem(lines, end, match);
    items.push(item.inner);
    isLoose ||= item.hasBlank;
    let next = item.end;
    while (next < lines.length && lines[next].trim() === "") next++;
    const goesOn = next < lines.length && ITEM.exec(lines[next])?.[2].at(-1) === mark;
    if (goesOn && next > item.end) isLoose = true;
    end = goesOn ? next : item.end;
    if (!goesOn) break;
  }
  const start = /\d/.test(first[2]) ? parseInt(first[2], 10) : null;
  return { kind: "list", start, items, isLoose, end };
}

function takeItem(lines, at, [head, indent, mark, gap]) {
  // A wide gap begins a code block in the item. Nested markers may be indented less than Markdown requires.
  const offset = gap.length > 4 || gap === "" ? indent.length + mark.length + 1 : head.length;
  const nested = Math.min(offset, indent.length + 2);
  const inner = [lines[at].slice(Math.min(offset, head.length))];
  let end = at + 1;
  let hasBlank = false;
  let isFenced = matchFence(inner[0]) !== null;
  for (let next = end; next < lines.length; next++) {
    const line = lines[next];
    if (line.trim() === "") {
      inner.push("");
      continue;
    }
    const afterBlank = lines[next - 1].trim() === "";
    const isInside = indentOf(line) >= nested;
    if (!isInside && (afterBlank || isFenced || ITEM.test(line) || startsBlock(line))) break;
    const text = withoutIndent(line, offset);
    if (matchFence(text) !== null) isFenced = !isFenced;
    if (afterBlank && !isFenced) hasBlank = true;
    inner.push(text);
    end = next + 1;
  }
  inner.length = end - at;
  return { inner, end, hasBlank };
}

function takeFormula(lines, at) {
  const start = lines[at].trim();
  const close = Object.entries(FORMULA).find(([open]) => start.startsWith(open));
  if (close === undefined) return null;
  const [open, shut] = close;
  if (start.length > open.length && start.slice(open.length).includes(shut)) {
    const isWhole = start.endsWith(shut) && start.indexOf(shut, open.length) === start.length - shut.length;
    return isWhole ? { kind: "formula", text: start.slice(open.length, -shut.length).trim(), end: at + 1 } : null;
  }
  for (let end = at + 1; end < lines.length && lines[end].trim() !== ""; end++) {
    if (!lines[end].trimEnd().endsWith(shut)) continue;
    const text = lines
      .slice(at, end + 1)
      .join("\n")
      .trim();
    return { kind: "formula", text: text.slice(open.length, -shut.length).trim(), end: end + 1 };
  }
  return null;
}

function takeTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[ \t|:-]+$/.test(lines[at + 1])) return null;
  const head = splitCells(lines[at]);
  const rule = splitCells(lines[at + 1]);
  if (rule.length !== head.length || !rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const align = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  let end = at + 2;
  const rows = [];
  while (end < lines.length && lines[end].trim() !== "" && lines[end].includes("|"))
    rows.push(splitCells(lines[end++]));
  return { kind: "table", head, align, rows, end };
}

function splitCells(line) {
  const cells = [];
  let cell = "";
  const text = line.trim();
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") cell += text[++i];
    else if (text[i] === "|") {
      if (i > 0) cells.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  if (!text.endsWith("|") || text.endsWith("\\|")) cells.push(cell.trim());
  return cells;
}

function takeParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end])) {
    if (takeTable(lines, end) !== null) break;
    end++;
  }
  const text = () =>
    lines
      .slice(at, end)
      .map((line) => line.trimStart())
      .join("\n")
      .trimEnd();
  const underline = end < lines.length && UNDERLINE.exec(lines[end]);
  if (underline) return { kind: "heading", level: underline[1][0] === "=" ? 1 : 2, text: text(), end: end + 1 };
  return { kind: "paragraph", text: text(), end };
}

/** Whether a line ends the paragraph before it. An ordered list does so only with number 1: "in\n1984. That year". */
function startsBlock(line) {
  if (matchFence(line) !== null || [HEADING, RULE, QUOTE, UNDERLINE].some((start) => start.test(line))) return true;
  const item = ITEM.exec(line);
  return item !== null && item[3] !== "" && (/^[-*+]$/.test(item[2]) || /^1[.)]$/.test(item[2]));
}

function indentOf(line) {
  let width = 0;
  for (const char of line) {
    if (char === " ") width++;
    else if (char === "\t") width += 4;
    else break;
  }
  return width;
}

function withoutIndent(line, width) {
  let at = 0;
  for (let left = width; left > 0 && (line[at] === " " || line[at] === "\t"); at++) left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

// -- rendering blocks ------------------------------------------------------------------------------------------

/** The element of a block. `grow` updates it to a longer version of the block and returns whether it could. */
function renderBlock(block, depth) {
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "heading": {
      const level = Math.min(6, block.level + 2); // the page's own headings are above
      return { node: withInline(`h${level}`, block.text, `heading-${block.level}`) };
    }
    case "rule":
      return { node: element("hr") };
    case "quote":
      return { node: withBlocks("blockquote", block.inner, depth) };
    case "list":
      return { node: list(block, depth) };
    case "table":
      return { node: table(block) };
    case "formula":
      return { node: formula(block.text, true, "p") };
    default:
      return { node: withInline("p", block.text) };
  }
}

function withInline(tag, text, className = null) {
  const node = element(tag, { class: className });
  renderInline(text, node);
  return node;
}

function withBlocks(tag, lines, depth) {
  const node = element(tag);
  appendBlocks(node, lines, depth);
  return node;
}

function appendBlocks(node, lines, depth) {
  if (depth >= MAX_DEPTH) {
    node.append(element("p", {}, lines.join("\n")));
    return;
  }
  for (const block of parseBlocks(lines.join("\n"))) node.append(renderBlock(block, depth + 1).node);
}

function list({ start, items, isLoose }, depth) {
  const node = element(start === null ? "ul" : "ol", { start: start === null || start === 1 ? null : start });
  for (const lines of items) node.append(listItem(lines, isLoose, depth));
  return node;
}

function listItem(lines, isLoose, depth) {
  const item = element("li");
  const task = /^\[([ xX])\][ \t]/.exec(lines[0]);
  const body = task === null ? lines : [lines[0].slice(task[0].length), ...lines.slice(1)];
  appendBlocks(item, body, depth);
  if (!isLoose) {
    for (const child of [...item.children])
      if (child.matches("p:not(.formula)")) child.replaceWith(...child.childNodes);
  }
  if (task !== null) {
    item.className = "task";
    const box = element("input", { type: "checkbox", disabled: true, "aria-label": task[1] === " " ? "open" : "done" });
    box.checked = task[1] !== " ";
    item.prepend(box, " ");
  }
  return item;
}

function table({ head, align, rows }) {
  const cell = (tag, text, i) => withInline(tag, text ?? "", align[i] === "left" ? null : `align-${align[i]}`);
  const headRow = element(
    "tr",
    {},
    head.map((text, i) => cell("th", text, i)),
  );
  const body = rows.map((row) =>
    element(
      "tr",
      {},
      head.map((_, i) => cell("td", row[i], i)),
    ),
  );
  const node = element("table", {}, element("thead", {}, headRow), element("tbody", {}, body));
  return element("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table" }, node);
}

function codeBlock(block) {
  const text = document.createTextNode(block.text);
  const code = element("code", {}, text);
  const copy = copyButton("Copy code", () => code.textContent);
  const node = element(
    "div",
    { class: "code-block" },
    element("div", { class: "code-head" }, element("span", {}, block.language || "text"), copy),
    element("pre", { tabindex: "0" }, code),
  );
  let { text: shown, language } = block;
  const finish = (last) => {
    if (last.isClosed) highlight(code, last.text, last.language);
  };
  finish(block);
  const grow = (next) => {
    if (next.kind !== "code" || next.language !== language || text.parentNode !== code) return false;
    if (!next.text.startsWith(shown)) return false;
    text.appendData(next.text.slice(shown.length));
    shown = next.text;
    finish(next);
    return true;
  };
  return { node, grow };
}
