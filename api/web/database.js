// IndexedDB with promises. It holds conversations and the files attached to them, which are too large for local storage.
// Each path of a server has a database of its own, as each has its own keys in storage.js.

import { PREFIX } from "./storage.js";

const VERSION = 1;
/** The stores, with the field that is the key. */
const STORES = { conversations: "id", files: "id" };

export class Database {
  #connection;

  constructor(connection) {
    this.#connection = connection;
    connection.addEventListener("versionchange", () => connection.close()); // a newer page waits for this one
  }

  /** @returns {Promise<?Database>} Null if the browser stores nothing for this page. */
  static async open() {
    try {
      const request = indexedDB.open(PREFIX, VERSION);
      request.addEventListener("upgradeneeded", () => {
        for (const [name, keyPath] of Object.entries(STORES)) {
          if (!request.result.objectStoreNames.contains(name)) request.result.createObjectStore(name, { keyPath });
        }
      });
      return new Database(await result(request));
    } catch {
      return null;
    }
  }

  /** All records of a store. */
  async all(store) {
    return result(this.#connection.transaction(store).objectStore(store).getAll());
  }

  /** A record, or null. */
  async get(store, key) {
    return (await result(this.#connection.transaction(store).objectStore(store).get(key))) ?? null;
  }

  /**
   * Writes records, all or none. They are copied at once, so they may change before the promise resolves.
   *
   * @param {string} store
   * @param {object[]} records To add or replace.
   * @param {string[]} removed Keys of records to remove.
   * @throws {DOMException} QuotaExceededError: the storage is full.
   */
  async write(store, records, removed = []) {
    const transaction = this.#connection.transaction(store, "readwrite");
    for (const record of records) transaction.objectStore(store).put(record);
    for (const key of removed) transaction.objectStore(store).delete(key);
    transaction.commit(); // at once: the page may be about to close
    await new Promise((resolve, reject) => {
      transaction.addEventListener("complete", resolve);
      transaction.addEventListener("abort", () => reject(transaction.error));
    });
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
  });
}
