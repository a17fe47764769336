// Short notices at the edge of the page, and announcements for screen readers.

import { byId, element } from "./dom.js";

const SHOWN_MS = 7000;
let timer = 0;

/**
 * Shows a short notice.
 *
 * @param {string} text The text.
 * @param {object} action `label` and `run` of an action button, if any.
 */
export function notify(text, action = null) {
  const place = byId("notices");
  const button =
    action === null
      ? null
      : element(
          "button",
          {
            type: "button",
            class: "button small",
            click: () => {
              close();
              action.run();
            },
          },
          action.label,
        );
  const notice = element("div", { class: "notice" }, element("span", {}, text), button);
  const close = () => notice.remove();
  const waitAndClose = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      // A notice does not disappear while the user points at it or has focused it.
      if (notice.matches(":hover, :focus-within")) waitAndClose();
      else close();
    }, SHOWN_MS);
  };
  place.replaceChildren(notice);
  waitAndClose();
}

/** Announces a text to screen readers only. */
export function announce(text) {
  byId("announcer").textContent = text;
}
