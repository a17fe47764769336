// Searches conversations for words.

const BEFORE = 24;
const AFTER = 80;
/** Characters shown around a match. */

/** The words of a query, in lower case. */
export function wordsOf(query) {
  return query.toLowerCase().split(/\s+/).filter(Boolean);
}

/**
 * Looks for words in a conversation: all of them must be in its title or in its messages, of any branch.
 *
 * @param {object} conversation
 * @param {string[]} words In lower case.
 * @returns {?{message: ?object, snippet: ?object}} Null if it does not match. Otherwise the first message with the most
 *   words, above all words that the title lacks, and a part of it as {before, match, after}; both null if only the title
 *   matches.
 */
export function find(conversation, words) {
  const missing = new Set(words);
  const note = (text) => {
    const found = words.filter((word) => text.includes(word));
    for (const word of found) missing.delete(word);
    return found;
  };
  const inTitle = new Set(note(conversation.title.toLowerCase()));
  let best = null;
  for (const message of conversation.messages) {
    const text = textOf(message);
    const found = note(text.toLowerCase());
    const others = found.filter((word) => !inTitle.has(word));
    const score = others.length * words.length + found.length;
    if (score > (best?.score ?? 0)) best = { message, text, word: others[0] ?? found[0], score };
  }
  if (missing.size > 0) return null;
  if (best === null) return { message: null, snippet: null };
  return { message: best.message, snippet: snippet(best.text, best.word) };
}

function textOf({ content, attachments = [] }) {
  return [content, ...attachments.map(({ name, text }) => (text === undefined ? name : `${name}\n${text}`))].join("\n");
}

function snippet(text, word) {
  // Lower case may have another length, so the place is looked for in the text itself.
  const pattern = new RegExp(word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu");
  const match = pattern.exec(text);
  if (match === null) return null;
  const [start, end] = [Math.max(0, match.index - BEFORE), match.index + match[0].length];
  return {
    before: (start > 0 ? "…" : "") + flat(text.slice(start, match.index)),
    match: match[0],
    after: flat(text.slice(end, end + AFTER)),
  };
}

function flat(text) {
  return text.replace(/\s+/g, " ");
}
