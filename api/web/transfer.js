// Export and import of conversations and saved prompts, as JSON with the images in it.

import { dataUrl, imageIn } from "./attachments.js";
import { newId } from "./conversations.js";
import { offerFile } from "./dom.js";
import { savedPrompts, savePrompts } from "./prompts.js";
import { repair, repairPrompt } from "./stored.js";

const FORMAT = "octavo-chats";
const VERSION = 1;

/** Offers one conversation as a file. */
export async function exportOne(store, conversation) {
  const name =
    conversation.title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 40) || "conversation";
  offerFile(`${name}.json`, [JSON.stringify(await complete(conversation, store.files), null, 2)]);
}

/** Offers all conversations and saved prompts as a file. */
export async function exportAll(store) {
  const head = { format: FORMAT, version: VERSION, prompts: savedPrompts() };
  const pieces = [JSON.stringify(head).slice(0, -1), ',"conversations":['];
  // In pieces: a text of everything might be longer than texts may be.
  for (const [i, conversation] of store.list().entries()) {
    pieces.push(i > 0 ? ",\n" : "\n", JSON.stringify(await complete(conversation, store.files)));
  }
  pieces.push("\n]}\n");
  offerFile(`octavo-chats-${new Date().toISOString().slice(0, 10)}.json`, pieces);
}

/** A conversation with its images as data URLs. */
async function complete(conversation, files) {
  const withData = async (attachment) => {
    if (attachment.kind !== "image") return attachment;
    const blob = await files.get(attachment.file);
    return blob === null ? attachment : { ...attachment, data: await dataUrl(blob) };
  };
  const messages = conversation.messages.map(async (message) => {
    if (message.attachments === undefined) return message;
    return { ...message, attachments: await Promise.all(message.attachments.map(withData)) };
  });
  return { ...conversation, messages: await Promise.all(messages) };
}

/**
 * Adds what is in a file: one conversation, a list of them, or everything that was exported.
 *
 * @param {ConversationStore} store
 * @param {string} text The content of the file.
 * @returns {Promise<{added: number, known: number, prompts: number, isKept: boolean}>} `added` and `known`: the numbers
 *   of new conversations and of those that were there already; `prompts`: the number of new prompts; `isKept`: whether
 *   the browser has kept all.
 * @throws {SyntaxError} It is not JSON, or nothing in it can be imported; the message says so.
 */
export async function importText(store, text) {
  const value = parse(text);
  const conversations = (value?.conversations ?? (Array.isArray(value) ? value : [value])) || [];
  const found = (Array.isArray(conversations) ? conversations : []).map((one) => [one, repair(one, idOf(one))]);
  const usable = found.filter(([, conversation]) => conversation !== null && conversation.messages.length > 0);
  const prompts = Array.isArray(value?.prompts) ? value.prompts.map(repairPrompt).filter(Boolean) : [];
  if (usable.length === 0 && prompts.length === 0) throw new SyntaxError("There are no conversations in this file.");
  const added = usable.filter(([, conversation]) => !isKnown(store, conversation));
  let isKept = true;
  const ids = new Set();
  for (const [one, conversation] of added) {
    // Another conversation of this id may have gone on differently; both stay.
    if (store.get(conversation.id) !== null || ids.has(conversation.id)) conversation.id = newId();
    ids.add(conversation.id);
    isKept = (await keepImages(one, conversation, store.files)) && isKept;
  }
  isKept = (await store.saveAll(added.map(([, conversation]) => conversation))) && isKept;
  const counts = { added: added.length, known: usable.length - added.length };
  return { ...counts, prompts: addPrompts(prompts), isKept };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new SyntaxError("This file is not JSON.");
  }
}

function idOf(value) {
  return typeof value?.id === "string" && /^[0-9a-z-]{1,64}$/i.test(value.id) ? value.id : newId();
}

function isKnown(store, conversation) {
  const known = repair(store.get(conversation.id), conversation.id);
  const content = ({ messages }) => JSON.stringify(messages, (name, value) => (name === "file" ? undefined : value));
  return known !== null && content(known) === content(conversation);
}

/** Keeps the images of an imported conversation under new ids. */
async function keepImages(value, conversation, files) {
  const addresses = new Map();
  for (const message of value.messages) {
    if (!Array.isArray(message?.attachments)) continue;
    for (const one of message.attachments) if (typeof one?.data === "string") addresses.set(one.file, one.data);
  }
  let isKept = true;
  for (const attachment of conversation.messages.flatMap(({ attachments = [] }) => attachments)) {
    const blob = attachment.kind === "image" ? imageIn(addresses.get(attachment.file) ?? "") : null;
    if (blob === null) continue; // its message says that it is missing
    attachment.file = newId();
    isKept = (await files.put(attachment.file, blob)) && isKept;
  }
  return isKept;
}

function addPrompts(prompts) {
  const known = savedPrompts();
  const texts = new Set(known.map(({ text }) => text));
  const added = prompts.filter(({ text }) => !texts.has(text)).map((prompt) => ({ ...prompt, id: newId() }));
  if (added.length > 0) savePrompts([...known, ...added]);
  return added.length;
}
