// What the page has to say: short notices at the edge, and announcements for screen readers.

import { byId, element } from "./dom.js";

const SHOWN_MS = 7000;
let timer = 0;

/**
 * Shows a short notice.
 *
 * @param {string} text What to say.
 * @param {object} action `label` and `run` of a button, if something can be done about it.
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
      // Nothing goes away under somebody's hands.
      if (notice.matches(":hover, :focus-within")) waitAndClose();
      else close();
    }, SHOWN_MS);
  };
  place.replaceChildren(notice);
  waitAndClose();
}

/** Says something to screen readers only. */
export function announce(text) {
  byId("announcer").textContent = text;
}
