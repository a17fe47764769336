// The list of conversations: search, open, rename, export, delete.

import { byId, element, iconButton } from "./dom.js";
import { age, count, number } from "./format.js";
import { announce, notify } from "./notices.js";
import { find, wordsOf } from "./search.js";
import { exportAll, exportOne, importText } from "./transfer.js";

const SEARCH_MS = 120;
const PAGE = 200;
/** Conversations shown at first, and with each click on "Show more". */

export class Sidebar {
  #store;
  #isRunning;
  #onRemove;
  #current = null;
  #renaming = null;
  #search = byId("search");
  #words = [];
  #timer = 0;
  #limit = PAGE;

  /**
   * @param {ConversationStore} store
   * @param {object} callbacks `isRunning(id)`, `onRemove(id)`.
   */
  constructor(store, { isRunning, onRemove }) {
    this.#store = store;
    this.#isRunning = isRunning;
    this.#onRemove = onRemove;
    store.addEventListener("change", () => this.show());
    if (!store.isKept) {
      byId("storage-note").textContent = "This browser stores nothing: conversations are lost when you close the page.";
    }
    this.#listenToSearch();
    this.#listenToTransfer();
    this.show();
  }

  #listenToSearch() {
    const field = this.#search;
    const look = () => {
      this.#words = wordsOf(field.value);
      this.#limit = PAGE;
      this.show();
      if (this.#words.length > 0) announce(count(this.#found().length, "result"));
    };
    field.addEventListener("input", () => {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(look, SEARCH_MS);
    });
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape" && field.value !== "") {
        event.stopPropagation(); // does not close the panel
        event.preventDefault();
        field.value = "";
        look();
      } else if (event.key === "Enter") {
        clearTimeout(this.#timer);
        look();
        if (this.#words.length > 0) byId("conversations").querySelector("a")?.click();
      }
    });
  }

  #listenToTransfer() {
    const picker = byId("import-picker");
    byId("import").addEventListener("click", () => picker.click());
    picker.addEventListener("change", async () => {
      for (const file of picker.files) await this.#import(file);
      picker.value = "";
    });
    byId("export-all").addEventListener("click", () => exportAll(this.#store));
  }

  async #import(file) {
    try {
      const { added, known, prompts, isKept } = await importText(this.#store, await file.text());
      const parts = [`Imported ${count(added, "conversation")}`];
      if (known > 0) parts.push(`${number(known)} already here`);
      if (prompts > 0) parts.push(count(prompts, "prompt"));
      notify(`${parts.join(", ")}.${isKept ? "" : " The browser's storage is full: not all of it is kept."}`);
    } catch (error) {
      notify(`${file.name} was not imported: ${error.message}`);
    }
  }

  /** Marks the current conversation. */
  select(id) {
    this.#current = id;
    this.show();
  }

  show() {
    if (this.#renaming !== null) return; // keep the field with the typed text
    const list = byId("conversations");
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
    const all = this.#words.length > 0 ? this.#found() : this.#store.list().map((conversation) => ({ conversation }));
    const items = all.slice(0, this.#limit).map(({ conversation, found }) => this.#item(conversation, found));
    if (all.length > this.#limit) items.push(this.#moreButton());
    const none = this.#words.length > 0 ? "Nothing found" : "No conversations yet";
    list.replaceChildren(...(items.length > 0 ? items : [element("li", { class: "quiet small empty" }, none)]));
    byId("export-all").disabled = this.#store.list().length === 0;
    if (focused !== undefined) list.querySelector(`[data-focus="${focused}"]`)?.focus();
  }

  #found() {
    const results = [];
    for (const conversation of this.#store.list()) {
      const found = find(conversation, this.#words);
      if (found !== null) results.push({ conversation, found });
    }
    return results;
  }

  #moreButton() {
    const show = () => {
      const number = this.#limit;
      this.#limit += PAGE;
      this.show();
      byId("conversations").querySelectorAll("a")[number]?.focus();
    };
    return element(
      "li",
      {},
      element("button", { type: "button", class: "button small wide", click: show }, "Show more"),
    );
  }

  #item(conversation, found = null) {
    const { id } = conversation;
    const title = conversation.title || "Untitled";
    const place = found?.message ? `/${found.message.id}` : "";
    const link = element(
      "a",
      {
        href: `#chat/${id}${place}`,
        "aria-current": id === this.#current ? "true" : null,
        title,
        "data-focus": `open-${id}`,
      },
      element("span", { class: "conversation-title" }, title),
      this.#isRunning(id)
        ? element("span", { class: "running-dot", role: "img", "aria-label": "answering" })
        : element("span", { class: "conversation-age" }, age(conversation.updated)),
      found?.snippet ? snippet(found.snippet) : null,
    );
    const button = (icon, label, run) =>
      iconButton(icon, `${label}: ${title}`, run, { class: "icon-button tiny", "data-focus": `${icon}-${id}` });
    const item = element(
      "li",
      {},
      link,
      element(
        "span",
        { class: "conversation-buttons" },
        button("edit", "Rename", () => this.#rename(conversation, item)),
        button("download", "Export", () => exportOne(this.#store, conversation)),
        button("trash", "Delete", () => this.#remove(conversation)),
      ),
    );
    return item;
  }

  #rename(conversation, item) {
    const input = element("input", { type: "text", "aria-label": "Title", maxlength: 200, autocomplete: "off" });
    input.value = conversation.title;
    this.#renaming = input;
    const finish = (isWanted) => {
      if (this.#renaming !== input) return; // already handled: blur follows Enter or Esc
      this.#renaming = null;
      if (isWanted) this.#store.rename(conversation.id, input.value);
      this.show();
      byId("conversations").querySelector(`[data-focus="open-${conversation.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      finish(event.key === "Enter");
    });
    input.addEventListener("blur", () => finish(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  #remove(conversation) {
    this.#onRemove(conversation.id);
    this.#store.remove(conversation.id);
    notify(`Deleted "${conversation.title || "Untitled"}".`, {
      label: "Undo",
      run: () => this.#store.save(conversation),
    });
    byId("new-chat").focus();
  }
}

function snippet({ before, match, after }) {
  return element("span", { class: "conversation-snippet" }, before, element("mark", {}, match), after);
}
