// The messages of a conversation are a tree: another answer to the same question, or another wording of a question, is
// a sibling, and what follows it stays with it. `messages` lists all messages, parents before children. Each has an `id`,
// the id of its `parent` (null for a first message), and the id of the `child` that is shown (null for a last one). The
// conversation's own `child` is the first message that is shown.

/** The messages that are shown, in order. */
export function path(conversation) {
  const byId = indexed(conversation);
  const shown = [];
  for (let at = byId.get(conversation.child); at !== undefined; at = byId.get(at.child)) shown.push(at);
  return shown;
}

/** The messages before a message, in order, whether it is shown or not. */
export function before(conversation, message) {
  const byId = indexed(conversation);
  const found = [];
  for (let at = byId.get(message.parent); at !== undefined; at = byId.get(at.parent)) found.push(at);
  return found.reverse();
}

/** A message and its alternatives, oldest first. */
export function versions(conversation, message) {
  return conversation.messages.filter(({ parent }) => parent === message.parent);
}

/**
 * Adds a message and shows it.
 *
 * @param {object} conversation
 * @param {?object} parent The message that it follows; null for a first message.
 * @param {object} message Without id, parent and child.
 * @returns {object} The message.
 */
export function add(conversation, parent, message) {
  const id = newId(conversation);
  Object.assign(message, { id, parent: parent?.id ?? null, child: null });
  conversation.messages.push(message);
  (parent ?? conversation).child = id;
  return message;
}

/** Shows a message, and after it what was shown there last. */
export function choose(conversation, message) {
  const byId = indexed(conversation);
  for (let at = message; at !== undefined; at = byId.get(at.parent)) {
    (byId.get(at.parent) ?? conversation).child = at.id;
  }
}

/** Removes a message and all that follow it; the next version is shown in its place, or the previous one. */
export function remove(conversation, message) {
  const others = versions(conversation, message);
  const next = others[others.indexOf(message) + 1] ?? others[others.indexOf(message) - 1];
  const gone = new Set([message.id]);
  for (const { id, parent } of conversation.messages) if (gone.has(parent)) gone.add(id);
  conversation.messages = conversation.messages.filter(({ id }) => !gone.has(id));
  const parent = indexed(conversation).get(message.parent) ?? conversation;
  if (parent.child === message.id) parent.child = next?.id ?? null;
}

/** Makes a stored list of messages a tree. Lists without ids, as the page used to store them, become one branch. */
export function link(conversation) {
  const children = new Map([[null, []]]);
  let last = null;
  let free = newId(conversation);
  for (const message of conversation.messages) {
    const isUsable = isId(message.id) && !children.has(message.id);
    if (!isUsable) message.id = free++;
    if (!isUsable || !children.has(message.parent)) message.parent = last;
    children.get(message.parent).push(message.id);
    children.set(message.id, []);
    last = message.id;
  }
  for (const node of [conversation, ...conversation.messages]) {
    const own = children.get(node === conversation ? null : node.id);
    if (!own.includes(node.child)) node.child = own.at(-1) ?? null;
  }
}

function newId({ messages }) {
  return messages.reduce((most, { id }) => (isId(id) ? Math.max(most, id) : most), 0) + 1;
}

function isId(id) {
  return Number.isInteger(id) && id > 0 && id < 2 ** 32;
}

function indexed(conversation) {
  return new Map(conversation.messages.map((message) => [message.id, message]));
}
