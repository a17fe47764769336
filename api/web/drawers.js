// The two side panels. On wide screens they are beside the chat; on narrow screens they overlay it, and the rest of the
// page is inert until they are closed.

import { byId } from "./dom.js";
import * as storage from "./storage.js";

export class Drawer {
  #panel;
  #button;
  #name;
  #narrow;
  #isOpen;
  #isBeside;
  static #all = [];

  /**
   * @param {string} name Id of the panel; the button is `${name}-toggle`.
   * @param {object} options `isBeside`: whether it is open at the side unless the user has closed it; `width`: width of
   *   the page in pixels up to which it overlays the page, as in the style sheet.
   */
  constructor(name, { isBeside, width }) {
    this.#narrow = matchMedia(`(max-width: ${width}px)`);
    this.#name = name;
    this.#panel = byId(name);
    this.#button = byId(`${name}-toggle`);
    const kept = storage.read(`${name}-open`);
    this.#isBeside = kept === null ? isBeside : kept === "yes";
    this.#isOpen = this.#isBeside && !this.#narrow.matches;
    this.#button.addEventListener("click", () => this.toggle());
    this.#panel.querySelector(".drawer-close").addEventListener("click", () => this.close());
    byId("backdrop").addEventListener("click", () => this.closeIfOver());
    Drawer.#all.push(this);
    this.#narrow.addEventListener("change", () => {
      this.#isOpen = this.#isBeside && !this.#narrow.matches;
      this.#show();
    });
    this.#show();
  }

  get isOver() {
    return this.#isOpen && this.#narrow.matches;
  }

  toggle() {
    if (this.#isOpen) this.close();
    else this.open();
  }

  open() {
    this.#set(true);
    this.#panel.querySelector("button, textarea, input, a")?.focus();
  }

  close() {
    const hadFocus = this.#panel.contains(document.activeElement);
    if (!this.#isOpen) return;
    this.#set(false);
    if (hadFocus) this.#button.focus();
  }

  /** Closes the panel if it overlays the page. */
  closeIfOver() {
    if (this.isOver) this.close();
  }

  #set(isOpen) {
    this.#isOpen = isOpen;
    if (!this.#narrow.matches) {
      this.#isBeside = isOpen;
      try {
        storage.write(`${this.#name}-open`, isOpen ? "yes" : "no");
      } catch {
        // not saved: the next visit starts with the initial state
      }
    }
    this.#show();
  }

  #show() {
    this.#panel.classList.toggle("is-open", this.#isOpen);
    this.#button.setAttribute("aria-expanded", String(this.#isOpen));
    const isCovered = Drawer.#all.some((drawer) => drawer.isOver);
    for (const drawer of Drawer.#all) drawer.#panel.inert = !drawer.#isOpen || (isCovered && !drawer.isOver);
    byId("backdrop").hidden = !isCovered;
    byId("talk").inert = isCovered;
    byId("bar").inert = isCovered;
  }
}
