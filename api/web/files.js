// The files attached to messages, apart from the conversations: a growing answer is saved often, an image once.

const STORE = "files";
const MIN_AGE_MS = 24 * 3600 * 1000;
/** A file without a message may belong to a draft in another tab, or to a conversation whose deletion is undone. */

export class FileStore {
  #database;
  #unsaved = new Map();

  /** @param {?Database} database Null: files are kept until the page is closed. */
  constructor(database) {
    this.#database = database;
  }

  /**
   * Keeps a file.
   *
   * @param {string} id A new id.
   * @param {Blob} blob
   * @returns {Promise<boolean>} Whether the browser has kept it; otherwise it is gone when the page is closed.
   */
  async put(id, blob) {
    this.#unsaved.set(id, blob);
    if (this.#database === null) return true; // the user was told
    try {
      await this.#database.write(STORE, [{ id, blob, created: Date.now() }]);
    } catch {
      return false;
    }
    this.#unsaved.delete(id);
    return true;
  }

  /** A file, or null if it is not there any more. */
  async get(id) {
    if (this.#unsaved.has(id)) return this.#unsaved.get(id);
    try {
      return (await this.#database?.get(STORE, id))?.blob ?? null;
    } catch {
      return null;
    }
  }

  /** Removes the files that no message refers to. */
  async forgetAllBut(conversations) {
    if (this.#database === null) return;
    const used = new Set();
    for (const { messages } of conversations) {
      for (const { attachments = [] } of messages) for (const { file } of attachments) used.add(file);
    }
    const all = await this.#database.all(STORE);
    const unused = all.filter(({ id, created }) => !used.has(id) && created < Date.now() - MIN_AGE_MS);
    if (unused.length === 0) return;
    await this.#database
      .write(
        STORE,
        [],
        unused.map(({ id }) => id),
      )
      .catch(() => {}); // next time
  }
}
