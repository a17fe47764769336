// Saved prompts: a dialog to insert, write, change and delete them.

import { newId } from "./conversations.js";
import { element, icon, iconButton } from "./dom.js";
import * as storage from "./storage.js";
import { repairPrompt } from "./stored.js";

const NAME = "prompts";

/** All saved prompts, sorted by title. */
export function savedPrompts() {
  const values = storage.readJson(NAME);
  if (!Array.isArray(values)) return [];
  const prompts = values.map(repairPrompt).filter((prompt) => prompt !== null);
  return prompts.sort((one, other) => titleOf(one).localeCompare(titleOf(other)));
}

/** @throws {DOMException} The storage is full. */
export function savePrompts(prompts) {
  storage.write(NAME, JSON.stringify(prompts));
}

function titleOf({ title, text }) {
  return title || text.trim().split("\n", 1)[0].slice(0, 80);
}

/** The dialog. It is opened by `show`, and removes itself when it is closed. */
export class PromptDialog {
  #actions;
  #text;
  #body = element("div", { class: "prompts" });
  #dialog;

  /**
   * @param {string} text The text in the message field, which may be saved as a prompt.
   * @param {object} actions `insert(text)` into the message field; `system(text)`, use as system prompt.
   */
  constructor(text, actions) {
    this.#text = text;
    this.#actions = actions;
    this.#dialog = element(
      "dialog",
      { class: "dialog prompts-dialog", id: "prompts-dialog", "aria-labelledby": "prompts-title" },
      this.#body,
    );
    this.#dialog.addEventListener("close", () => this.#dialog.remove());
  }

  show() {
    document.body.append(this.#dialog);
    this.#showList();
    this.#dialog.showModal();
  }

  #showList(focused = null) {
    const prompts = savedPrompts();
    const list = element("ul", { class: "prompt-list" });
    const filter = element("input", {
      type: "search",
      id: "prompts-filter",
      placeholder: "Find a prompt",
      "aria-label": "Find a prompt",
      autocomplete: "off",
      input: () => fill(),
      keydown: (event) => {
        if (event.key !== "Enter" || event.isComposing) return;
        event.preventDefault();
        list.querySelector("button")?.click();
      },
    });
    const fill = () => {
      const word = filter.value.trim().toLowerCase();
      const found = prompts.filter(({ title, text }) => `${title}\n${text}`.toLowerCase().includes(word));
      const none = prompts.length === 0 ? "No saved prompts yet" : "No prompt has these words";
      const empty = element("li", { class: "quiet small empty" }, none);
      list.replaceChildren(...(found.length > 0 ? found.map((prompt) => this.#item(prompt)) : [empty]));
    };
    fill();
    this.#body.replaceChildren(
      element(
        "div",
        { class: "viewer-head" },
        element("h2", { id: "prompts-title" }, "Saved prompts"),
        iconButton("close", "Close", () => this.#dialog.close()),
      ),
      ...(prompts.length > 0 ? [filter] : []),
      list,
      element(
        "div",
        { class: "dialog-buttons" },
        element(
          "button",
          {
            type: "button",
            class: "button",
            id: "prompt-new",
            click: () => this.#edit({ id: "", title: "", text: this.#text }),
          },
          icon("plus"),
          this.#text.trim() === "" ? "New prompt" : "Save the message as a prompt",
        ),
      ),
    );
    const place = prompts.length > 0 ? filter : this.#body.querySelector("#prompt-new");
    (list.querySelector(`[data-prompt="${focused}"]`) ?? place).focus();
  }

  #item(prompt) {
    const title = titleOf(prompt);
    const use = (action) => {
      this.#dialog.close();
      action(prompt.text);
    };
    return element(
      "li",
      {},
      element(
        "button",
        { type: "button", class: "prompt", "data-prompt": prompt.id, click: () => use(this.#actions.insert) },
        element("span", { class: "prompt-title" }, title),
        element("span", { class: "prompt-text quiet small" }, prompt.text.slice(0, 200)),
      ),
      iconButton("sliders", `Use as system prompt: ${title}`, () => use(this.#actions.system)),
      iconButton("edit", `Edit: ${title}`, () => this.#edit(prompt)),
      iconButton("trash", `Delete: ${title}`, () => {
        this.#keep(savedPrompts().filter(({ id }) => id !== prompt.id));
        this.#showList();
      }),
    );
  }

  #edit(prompt) {
    const title = element("input", { type: "text", id: "prompt-title", maxlength: 200, autocomplete: "off" });
    const text = element("textarea", { id: "prompt-text", rows: 8, required: true });
    const problem = element("p", { class: "error-text small", role: "alert" });
    title.value = prompt.title;
    text.value = prompt.text;
    const save = () => {
      if (text.value.trim() === "") return;
      const id = prompt.id || newId();
      const others = savedPrompts().filter((other) => other.id !== id);
      const isKept = this.#keep([...others, { id, title: title.value.trim(), text: text.value }]);
      if (isKept) this.#showList(id);
      else problem.textContent = "The browser's storage is full.";
    };
    this.#body.replaceChildren(
      element(
        "form",
        {
          submit: (event) => {
            event.preventDefault();
            save();
          },
        },
        element("h2", { id: "prompts-title" }, prompt.id === "" ? "New prompt" : "Edit prompt"),
        element("label", { class: "field-label", for: "prompt-title" }, "Title"),
        title,
        element("label", { class: "field-label", for: "prompt-text" }, "Prompt"),
        text,
        problem,
        element(
          "div",
          { class: "dialog-buttons" },
          element("button", { type: "button", class: "button", click: () => this.#showList(prompt.id) }, "Cancel"),
          element("button", { type: "submit", class: "button primary" }, "Save"),
        ),
      ),
    );
    title.focus();
  }

  #keep(prompts) {
    try {
      savePrompts(prompts);
      return true;
    } catch {
      return false;
    }
  }
}
