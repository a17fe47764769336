// Conversations, saved in browser storage under one key each, so that tabs do not overwrite each other's changes. Their
// total size is limited; the oldest are evicted.
//
// A conversation: {id, title, created, updated, model, settings, messages}. A message: {role, content} and, for an
// answer, {reasoning, toolCalls, status, error, finishReason, stats, model}. Status is streaming, done, stopped or
// error.

import * as storage from "./storage.js";

const START = "conversation:";
const MAX_CHARS = 3_500_000;
/** Browsers allow an origin about 5 million characters. */
const MAX_TITLE = 60;
const ROLES = new Set(["user", "assistant", "tool"]);
const STATUSES = new Set(["done", "stopped", "error"]);

export function newConversation(model, settings) {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const now = Date.now();
  return { id, title: "", created: now, updated: now, model, settings: { ...settings }, messages: [] };
}

/** A title from the first words of a text. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  return line.length <= MAX_TITLE ? line : `${line.slice(0, MAX_TITLE).replace(/\s\S*$/, "")}…`;
}

/** All conversations. Dispatches a `change` event when the list has changed. */
export class ConversationStore extends EventTarget {
  #all = new Map();
  #sizes = new Map();

  constructor() {
    super();
    for (const name of storage.names(START)) this.#read(name);
    addEventListener("storage", (event) => {
      const name = storage.nameOf(event);
      if (!name?.startsWith(START)) return;
      this.#read(name);
      this.dispatchEvent(new CustomEvent("change", { detail: { id: name.slice(START.length), isForeign: true } }));
    });
  }

  #read(name) {
    const id = name.slice(START.length);
    const conversation = repair(storage.readJson(name), id);
    if (conversation === null) {
      this.#all.delete(id);
      this.#sizes.delete(id);
    } else {
      this.#all.set(id, conversation);
      this.#sizes.set(id, storage.read(name).length);
    }
  }

  /** Newest first. */
  list() {
    return [...this.#all.values()].sort((one, other) => other.updated - one.updated);
  }

  get(id) {
    return this.#all.get(id) ?? null;
  }

  /**
   * Saves a conversation.
   *
   * @returns {{removed: number, isKept: boolean}} Number of evicted ones, and whether it was saved.
   */
  save(conversation) {
    const { id } = conversation;
    this.#all.set(id, conversation);
    const text = JSON.stringify(conversation);
    const others = this.list().filter((other) => other.id !== id);
    let total = text.length;
    for (const other of others) total += this.#sizes.get(other.id) ?? 0;
    let removed = 0;
    let isKept = text.length <= MAX_CHARS;
    while (isKept) {
      if (total <= MAX_CHARS && tryWrite(START + id, text)) {
        this.#sizes.set(id, text.length);
        break;
      }
      const oldest = others.pop();
      if (oldest === undefined) isKept = false;
      else {
        total -= this.#sizes.get(oldest.id) ?? 0;
        this.#drop(oldest.id);
        removed++;
      }
    }
    this.#changed(id);
    return { removed, isKept };
  }

  rename(id, title) {
    const conversation = this.get(id);
    if (conversation === null || title.trim() === "") return;
    conversation.title = title.trim().slice(0, 200);
    this.save(conversation);
  }

  /** Removes a conversation and returns it, so that it can be restored. */
  remove(id) {
    const conversation = this.get(id);
    this.#drop(id);
    this.#changed(id);
    return conversation;
  }

  #drop(id) {
    this.#all.delete(id);
    this.#sizes.delete(id);
    storage.remove(START + id);
  }

  #changed(id) {
    this.dispatchEvent(new CustomEvent("change", { detail: { id, isForeign: false } }));
  }
}

function tryWrite(name, text) {
  try {
    storage.write(name, text);
    return true;
  } catch {
    return false;
  }
}

/** A stored conversation with all fields that the page relies on, or null if the value is not a conversation. */
function repair(value, id) {
  if (value === null || typeof value !== "object" || !Array.isArray(value.messages)) return null;
  const messages = value.messages.map(repairMessage).filter((message) => message !== null);
  return {
    id,
    title: textOr(value.title, ""),
    created: numberOr(value.created, 0),
    updated: numberOr(value.updated, 0),
    model: textOr(value.model, ""),
    settings: value.settings !== null && typeof value.settings === "object" ? value.settings : {},
    messages,
  };
}

function repairMessage(value) {
  if (value === null || typeof value !== "object" || !ROLES.has(value.role)) return null;
  const message = { ...value, content: textOr(value.content, "") };
  if (message.role !== "assistant") return message;
  message.reasoning = textOr(value.reasoning, "");
  message.toolCalls = Array.isArray(value.toolCalls) ? value.toolCalls.filter(isToolCall) : [];
  // An answer that was running when the page was closed ends where it was last saved.
  if (!STATUSES.has(message.status)) message.status = "stopped";
  message.error = textOr(value.error, "");
  message.stats = value.stats !== null && typeof value.stats === "object" ? value.stats : null;
  return message;
}

function isToolCall(call) {
  return (
    call !== null && typeof call === "object" && typeof call.name === "string" && typeof call.arguments === "string"
  );
}

function textOr(value, otherwise) {
  return typeof value === "string" ? value : otherwise;
}

function numberOr(value, otherwise) {
  return Number.isFinite(value) ? value : otherwise;
}
