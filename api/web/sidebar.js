// The list of conversations: open, rename, export, delete.

import { byId, element, iconButton, offerFile } from "./dom.js";
import { age } from "./format.js";
import { notify } from "./notices.js";

export class Sidebar {
  #store;
  #isRunning;
  #onRemove;
  #current = null;
  #renaming = null;

  /**
   * @param {ConversationStore} store
   * @param {object} callbacks `isRunning(id)`, `onRemove(id)`.
   */
  constructor(store, { isRunning, onRemove }) {
    this.#store = store;
    this.#isRunning = isRunning;
    this.#onRemove = onRemove;
    store.addEventListener("change", () => this.show());
    this.show();
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
    const items = this.#store.list().map((conversation) => this.#item(conversation));
    const empty = element("li", { class: "quiet small empty" }, "No conversations yet");
    list.replaceChildren(...(items.length > 0 ? items : [empty]));
    if (focused !== undefined) list.querySelector(`[data-focus="${focused}"]`)?.focus();
  }

  #item(conversation) {
    const { id } = conversation;
    const title = conversation.title || "Untitled";
    const isRunning = this.#isRunning(id);
    const link = element(
      "a",
      { href: `#chat/${id}`, "aria-current": id === this.#current ? "true" : null, title, "data-focus": `open-${id}` },
      element("span", { class: "conversation-title" }, title),
      isRunning
        ? element("span", { class: "running-dot", role: "img", "aria-label": "answering" })
        : element("span", { class: "conversation-age" }, age(conversation.updated)),
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
        button("download", "Export", () => exportJson(conversation)),
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

function exportJson(conversation) {
  const name =
    conversation.title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 40) || "conversation";
  offerFile(`${name}.json`, JSON.stringify(conversation, null, 2));
}
