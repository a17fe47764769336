// Parses link targets: the parentheses in [text](URL "title").

const SPACE = /[\s\u00a0]/;
export const MAX_ADDRESS = 2000;

/**
 * A parser for the link targets in a text. The total cost is linear, however many links there are: matching parentheses
 * are found in one pass, and the next occurrence of each character is cached.
 */
export class Targets {
  #text;
  /** Closing parentheses by opening ones, within words. */
  #pairs = new Map();
  /** The first unmatched closing parenthesis of each word, by the start of the word. */
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
   * Parses a URL, which may be in angle brackets, and an optional title.
   *
   * @param {number} start Position after the opening parenthesis.
   * @returns {?{address: string, end: number}} `end`: position after the closing one. Null: not a link target.
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

  /** Next position of a character (a space means any white space); the text's length if there is none. */
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
