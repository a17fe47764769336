// What stands in the parentheses of links.

const SPACE = /[\s\u00a0]/;
export const MAX_ADDRESS = 2000;

/**
 * Reads them. Every search goes through the text once, however many links begin: pairs of
 * parentheses are found in one pass, and what comes next of a kind is remembered.
 */
export class Targets {
  #text;
  /** Closing parentheses by opening ones, within words. */
  #pairs = new Map();
  /** By the beginning of a word: its first closing parenthesis without an opening one. */
  #odd = new Map();
  #next = new Map();

  constructor(text) {
    this.#text = text;
    const open = [];
    let word = 0;
    for (let i = 0; i < text.length; i++) {
      const char = text[i];
      if (char === "(") open.push(i);
      else if (char === ")") {
        if (open.length > 0) this.#pairs.set(open.pop(), i);
        else if (!this.#odd.has(word)) this.#odd.set(word, i);
      } else if (SPACE.test(char)) {
        open.length = 0;
        word = i + 1;
      }
    }
  }

  /**
   * Reads an address, perhaps in angle brackets, and perhaps a title.
   *
   * @param {number} start Behind the opening parenthesis.
   * @returns {?{address: string, end: number}} `end`: behind the closing one. Null: there is none.
   */
  at(start) {
    const text = this.#text;
    const limit = Math.min(text.length, start + MAX_ADDRESS);
    const first = this.#skipSpace(start, limit);
    let [from, end] = [first, first];
    if (text[first] === "<") {
      end = this.#find(">", first);
      if (end >= limit || this.#find("\n", first) < end) return null;
      from = first + 1;
    } else {
      end = (first === start ? this.#pairs.get(start - 1) : this.#odd.get(first)) ?? this.#find(" ", first);
      if (end >= limit) return null;
    }
    const last = end;
    let at = this.#skipSpace(text[first] === "<" ? end + 1 : end, limit);
    if (text[at] === '"' || text[at] === "'") {
      const quote = this.#find(text[at], at + 1);
      if (quote >= limit) return null;
      at = this.#skipSpace(quote + 1, limit);
    }
    return text[at] === ")" ? { address: text.slice(from, last), end: at + 1 } : null;
  }

  #skipSpace(start, limit) {
    let at = start;
    while (at < limit && SPACE.test(this.#text[at])) at++;
    return at;
  }

  /** The next place of a character, where a space stands for all white space; the text's length if there is none. */
  #find(char, start) {
    const known = this.#next.get(char);
    if (known !== undefined && known.start <= start && start <= known.found) return known.found;
    const rest = char === " " ? /[\s\u00a0]/g : null;
    let found;
    if (rest === null) found = this.#text.indexOf(char, start);
    else {
      rest.lastIndex = start;
      found = rest.exec(this.#text)?.index ?? -1;
    }
    if (found < 0) found = this.#text.length;
    this.#next.set(char, { start, found });
    return found;
  }
}
