// Syntax highlighting: comments, strings, numbers and keywords, which are similar in most languages. It is approximate,
// and never changes the text.

import { element } from "./dom.js";

const MAX_CHARS = 30000;
/** Longer code is not highlighted. */

const words = (text) => new Set(text.split(" "));
const C_COMMENT = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
const HASH_COMMENT = String.raw`#[^\n]*`;
const SQL_COMMENT = String.raw`--[^\n]*`;
const STRINGS = String.raw`"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?`;
const PYTHON_STRINGS = `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${STRINGS}`;
const TEMPLATE_STRINGS = String.raw`${STRINGS}|\x60(?:[^\x60\\]|\\[^])*\x60?`;
const QUOTED = String.raw`"(?:[^"\\\n]|\\[^])*"?`;

const JS = words(
  "async await break case catch class const continue debugger default delete do else export extends false finally for " +
    "from function get if import in instanceof interface let new null of return set static super switch this throw " +
    "true try type typeof undefined var void while with yield enum implements private public readonly",
);
const PYTHON = words(
  "False None True and as assert async await break case class continue def del elif else except finally for from " +
    "global if import in is lambda match nonlocal not or pass raise return self try while with yield",
);
const C = words(
  "abstract auto bool boolean break case catch char class const constexpr continue default delete do double else enum " +
    "explicit extends extern false final finally float for foreach friend goto if implements import inline int " +
    "interface internal long mutable namespace new null nullptr operator override package private protected public " +
    "return short signed sizeof static string struct super switch template this throw throws true try typedef typename " +
    "union unsigned using var virtual void volatile while include define ifdef ifndef endif pragma",
);
const GO = words(
  "break case chan const continue default defer else fallthrough false for func go goto if import interface map nil " +
    "package range return select struct switch true type var string int error bool byte float64 int64",
);
const RUST = words(
  "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut " +
    "pub ref return self Self static struct super trait true type unsafe use where while",
);
const SHELL = words(
  "if then else elif fi for while until do done case esac in function return export local readonly set unset exit cd " +
    "echo source sudo",
);
const SQL = words(
  "select from where and or not insert into values update set delete create table index view drop alter add join left " +
    "right inner outer full on as group by order having limit offset union all distinct null is in like between case " +
    "when then else end primary key foreign references default exists with asc desc count sum avg min max",
);
const LITERALS = words("true false null yes no on off");

const LANGUAGES = {
  javascript: [C_COMMENT, TEMPLATE_STRINGS, JS],
  python: [HASH_COMMENT, PYTHON_STRINGS, PYTHON],
  c: [C_COMMENT, STRINGS, C],
  go: [C_COMMENT, TEMPLATE_STRINGS, GO],
  rust: [C_COMMENT, QUOTED, RUST],
  shell: [String.raw`(?<![^\s;])#[^\n]*`, STRINGS, SHELL],
  sql: [SQL_COMMENT, STRINGS, SQL],
  yaml: [String.raw`(?<![^\s])#[^\n]*`, STRINGS, LITERALS],
  json: [C_COMMENT, QUOTED, LITERALS],
  css: [String.raw`\/\*[^]*?(?:\*\/|$)`, STRINGS, words("important media supports keyframes import")],
  markup: ["<!--[^]*?(?:-->|$)", QUOTED, new Set()],
};
const ALIASES = {
  javascript: "js jsx ts tsx typescript mjs",
  python: "py python3 ruby rb",
  c: "cpp c++ h hpp cs csharp java kotlin swift php scala cuda",
  go: "golang",
  rust: "rs",
  shell: "sh bash zsh console dockerfile makefile",
  yaml: "yml toml ini",
  json: "jsonc",
  css: "scss less",
  markup: "html xml svg vue",
};
const NAMES = Object.fromEntries(
  Object.entries(ALIASES).flatMap(([language, names]) => names.split(" ").map((name) => [name, language])),
);

const patterns = new Map();

function patternOf(language) {
  let found = patterns.get(language);
  if (found === undefined) {
    const [comment, string] = LANGUAGES[language];
    const number = String.raw`(?<![\w.])(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)(?!\w)`;
    found = new RegExp(`(${comment})|(${string})|(${number})|([A-Za-z_]\\w*)`, "g");
    patterns.set(language, found);
  }
  return found;
}

/** Replaces the content of an element with highlighted text. */
export function highlight(code, text, name) {
  const lower = name.toLowerCase();
  if (text.length > MAX_CHARS) return;
  if (lower === "diff" || lower === "patch") {
    code.replaceChildren(...diff(text));
    return;
  }
  const language = Object.hasOwn(LANGUAGES, lower) ? lower : Object.hasOwn(NAMES, lower) ? NAMES[lower] : null;
  if (language === null) return;
  const keywords = LANGUAGES[language][2];
  const isSql = language === "sql";
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(patternOf(language))) {
    const kind = kindOf(match, keywords, isSql);
    if (kind === null) continue;
    if (match.index > at) parts.push(text.slice(at, match.index));
    parts.push(element("span", { class: kind }, match[0]));
    at = match.index + match[0].length;
  }
  parts.push(text.slice(at));
  code.replaceChildren(...parts);
}

function kindOf([whole, comment, string, number], keywords, ignoreCase) {
  if (comment !== undefined) return "syntax-comment";
  if (string !== undefined) return "syntax-string";
  if (number !== undefined) return "syntax-number";
  return keywords.has(ignoreCase ? whole.toLowerCase() : whole) ? "syntax-keyword" : null;
}

function* diff(text) {
  for (const [i, line] of text.split("\n").entries()) {
    if (i > 0) yield "\n";
    const kind = line.startsWith("+") ? "syntax-added" : line.startsWith("-") ? "syntax-removed" : null;
    yield kind === null ? line : element("span", { class: kind }, line);
  }
}
