// Conversations: all of them in memory, and each in a record of the browser's database, so that tabs do not overwrite
// each other's changes. stored.js describes their form.

import { Database } from "./database.js";
import { FileStore } from "./files.js";
import * as storage from "./storage.js";
import { repair } from "./stored.js";

const STORE = "conversations";
const OLD_START = "conversation:";
/** Keys of conversations in local storage, where earlier versions of the page kept them. */
const MAX_TITLE = 60;

/** A random id. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(model, settings) {
  const now = Date.now();
  const empty = { title: "", child: null, messages: [] };
  return { id: newId(), created: now, updated: now, model, settings: { ...settings }, ...empty };
}

/** A title from the first words of a text. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  return line.length <= MAX_TITLE ? line : `${line.slice(0, MAX_TITLE).replace(/\s\S*$/, "")}…`;
}

/** All conversations. Dispatches a `change` event when the list has changed. */
export class ConversationStore extends EventTarget {
  /** The files attached to messages. */
  files;
  #all = new Map();
  #database;
  #otherTabs = new BroadcastChannel(storage.PREFIX);

  constructor(database) {
    super();
    this.#database = database;
    this.files = new FileStore(database);
    this.#otherTabs.addEventListener("message", ({ data }) => this.#read(String(data)));
  }

  /** The store with all conversations that the browser has kept. */
  static async open() {
    const store = new ConversationStore(await Database.open());
    try {
      await store.#load();
      return store;
    } catch {
      return new ConversationStore(null);
    }
  }

  /** Whether anything outlives the page. */
  get isKept() {
    return this.#database !== null;
  }

  async #load() {
    for (const record of (await this.#database?.all(STORE)) ?? []) this.#take(record, record.id);
    await this.#moveOld();
    await this.files.forgetAllBut(this.list());
  }

  #take(record, id) {
    const conversation = repair(record, id);
    if (conversation !== null) this.#all.set(id, conversation);
    return conversation;
  }

  /** Moves conversations from local storage. A tab with an earlier version of the page may still add some. */
  async #moveOld() {
    const moved = [];
    const names = storage.names(OLD_START);
    for (const name of names) {
      const id = name.slice(OLD_START.length);
      const value = storage.readJson(name);
      if (!(value?.updated <= this.get(id)?.updated)) moved.push(this.#take(value, id));
    }
    if (names.length === 0 || this.#database === null) return;
    try {
      await this.#database.write(
        STORE,
        moved.filter((conversation) => conversation !== null),
      );
      for (const name of names) storage.remove(name);
    } catch {
      // they stay where they are, and are moved next time
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
   * Saves a conversation as it is now.
   *
   * @returns {Promise<boolean>} Whether the browser has kept it.
   */
  async save(conversation) {
    this.#all.set(conversation.id, conversation);
    return this.#write(conversation.id, [conversation]);
  }

  /** Saves several; see `save`. */
  async saveAll(conversations) {
    for (const conversation of conversations) this.#all.set(conversation.id, conversation);
    return this.#write(null, conversations);
  }

  async rename(id, title) {
    const conversation = this.get(id);
    if (conversation === null || title.trim() === "") return;
    conversation.title = title.trim().slice(0, 200);
    await this.save(conversation);
  }

  /** Removes a conversation. It may be saved again. */
  async remove(id) {
    this.#all.delete(id);
    await this.#write(id, [], [id]);
  }

  async #write(id, conversations, removed = []) {
    this.#changed(id, false);
    if (this.#database === null) return true; // the user was told
    try {
      await this.#database.write(STORE, conversations, removed);
    } catch {
      return false;
    }
    for (const key of [...conversations.map((conversation) => conversation.id), ...removed]) {
      this.#otherTabs.postMessage(key);
    }
    return true;
  }

  /** Another tab has written a conversation. */
  async #read(id) {
    const record = (await this.#database?.get(STORE, id)) ?? null;
    if (record === null) this.#all.delete(id);
    else this.#take(record, id);
    this.#changed(id, true);
  }

  #changed(id, isForeign) {
    this.dispatchEvent(new CustomEvent("change", { detail: { id, isForeign } }));
  }
}
