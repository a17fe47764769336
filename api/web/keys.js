// The API key: requested when the server requires one, and saved for the tab or, if the user chooses so, the browser.

import { element } from "./dom.js";
import * as storage from "./storage.js";

const NAME = "api-key";

let remembered = null;
/** Holds the key until the page is closed, for browsers without storage. */

export function currentKey() {
  return storage.read(NAME, storage.sessionArea()) ?? storage.read(NAME) ?? remembered;
}

/** Deletes the key from all storage. */
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
    // the key is kept in the variable
  }
  document.dispatchEvent(new Event("keychange"));
}

/** The header for a key. Browsers treat header values as bytes, so non-ASCII characters are encoded as UTF-8. */
export function authorization(key) {
  return `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
}

let question = null;

/**
 * Asks the user for the key, in one dialog for all requests that need it.
 *
 * @param {string|null} refused The key that was just rejected.
 * @returns {Promise<boolean>} Whether there is a new key.
 */
export function askForKey(refused) {
  if (currentKey() !== refused) return Promise.resolve(true); // another request has already got one
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
