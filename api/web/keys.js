// The API key: asked for when the server wants one, kept for the tab, or for the browser if the user says so.

import { element } from "./dom.js";
import * as storage from "./storage.js";

const NAME = "api-key";

let remembered = null;
/** For pages without storage: as long as the page lives. */

export function currentKey() {
  return storage.read(NAME, storage.sessionArea()) ?? storage.read(NAME) ?? remembered;
}

/** Drops the key everywhere. */
export function forgetKey() {
  remembered = null;
  storage.remove(NAME);
  storage.remove(NAME, storage.sessionArea());
  document.dispatchEvent(new Event("keychange"));
}

function keep(key, always) {
  forgetKey();
  remembered = key;
  try {
    storage.write(NAME, key, always ? undefined : storage.sessionArea());
  } catch {
    // it stays in the variable
  }
  document.dispatchEvent(new Event("keychange"));
}

/** The header for a key. Header values are bytes to a browser, so letters beyond ASCII go as UTF-8. */
export function authorization(key) {
  return `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
}

let question = null;

/**
 * Asks for the key, in one dialog however many requests want it.
 *
 * @param {string|null} refused The key that was just refused.
 * @returns {Promise<boolean>} Whether there is a new one.
 */
export function askForKey(refused) {
  if (currentKey() !== refused) return Promise.resolve(true); // somebody else was faster
  question ??= showDialog(refused !== null).finally(() => {
    question = null;
  });
  return question;
}

function showDialog(wasRefused) {
  const input = element("input", {
    id: "key-input",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "key-note",
  });
  const always = element("input", { type: "checkbox", id: "key-always" });
  const note = wasRefused ? "The server rejected this key." : "This server requires an API key.";
  const cancel = element("button", { type: "button", class: "button", click: () => dialog.close() }, "Cancel");
  const form = element(
    "form",
    {
      submit: (event) => {
        event.preventDefault();
        const key = input.value.trim();
        if (key === "") return;
        keep(key, always.checked);
        dialog.close("given");
      },
    },
    element("h2", { id: "key-title" }, "API key"),
    element("p", { id: "key-note", class: wasRefused ? "error-text" : "quiet" }, note),
    element("label", { class: "field-label", for: "key-input" }, "Key"),
    input,
    element("label", { class: "check" }, always, "Remember in this browser"),
    element("p", { class: "quiet small" }, "Otherwise it is forgotten when you close this tab."),
    element(
      "div",
      { class: "dialog-buttons" },
      cancel,
      element("button", { type: "submit", class: "button primary" }, "Continue"),
    ),
  );
  const dialog = element("dialog", { class: "dialog", id: "key-dialog", "aria-labelledby": "key-title" }, form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "given");
      dialog.remove();
    });
    dialog.showModal();
  });
}
