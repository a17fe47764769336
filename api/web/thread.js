// The message list of the current conversation, and its scroll position.

import { path, versions } from "./branches.js";
import { byId, element } from "./dom.js";
import { MessageView } from "./message-view.js";

const NEAR_END = 60;
/** Distance from the end in pixels within which the page scrolls along with an answer. */
const SUGGESTIONS = [
  "Explain how a transformer predicts the next token",
  "Write a Python function that merges two sorted lists",
  "Compare tea and coffee in a table",
];

export class Thread {
  #place = byId("messages");
  #scroller = byId("thread");
  #toEnd = byId("to-end");
  #views = new Map();
  #last = null;
  #follows = true;
  #actions;
  #onSuggestion;
  #frame = 0;
  #cost = 0;
  /** Milliseconds that the last update of the answer took. */

  /**
   * @param {object} actions See MessageView.
   * @param {(text: string) => void} onSuggestion Called when a suggestion is chosen.
   */
  constructor(actions, onSuggestion) {
    this.#actions = actions;
    this.#onSuggestion = onSuggestion;
    this.#scroller.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    this.#toEnd.addEventListener("click", () => {
      this.scrollToEnd();
      byId("composer-input").focus();
    });
    new ResizeObserver(() => this.#follow()).observe(this.#scroller);
  }

  /** Shows a conversation, reusing the views of messages already shown. */
  show(conversation, modelText = "") {
    const messages = path(conversation);
    const views = new Map();
    for (const message of messages) {
      views.set(message, this.#views.get(message) ?? new MessageView(message, this.#actions));
    }
    this.#views = views;
    const last = messages.at(-1) ?? null;
    for (const [message, view] of views) {
      const isNew = view.setVersions(versions(conversation, message));
      // The previously last message loses the actions that only the last one has.
      if (isNew || message === last || message === this.#last) view.update({ isLast: message === last });
    }
    this.#last = last;
    const nodes = [...views.values()].map((view) => view.node);
    this.#place.replaceChildren(...(nodes.length > 0 ? nodes : [this.#welcome(modelText)]));
    this.#follow();
  }

  /** Updates the view of a message immediately. */
  update(message, options = {}) {
    this.#views.get(message)?.update({ isLast: message === this.#last, ...options });
    this.#follow();
  }

  /** Schedules an update: at most one per frame, and fewer if updates are slow. */
  updateSoon(message, rate) {
    if (this.#frame !== 0) return;
    const show = () => {
      this.#frame = requestAnimationFrame(() => {
        const begin = performance.now();
        this.#frame = 0;
        if (message.status === "streaming") this.update(message, { rate: rate() });
        this.#cost = performance.now() - begin;
      });
    };
    if (this.#cost < 8) show();
    else this.#frame = setTimeout(show, 3 * this.#cost);
  }

  /** Moves the focus to the buttons that show other versions of a message. */
  focusVersions(message, name) {
    this.#views.get(message)?.focusVersions(name);
  }

  /** Scrolls to a message, which is marked for a moment. */
  scrollTo(message) {
    const node = this.#views.get(message)?.node;
    if (node === undefined) return;
    this.#follows = false;
    node.scrollIntoView({ block: "start" });
    node.classList.add("is-found");
    node.addEventListener("animationend", () => node.classList.remove("is-found"), { once: true });
    this.#noteScroll();
  }

  /** Scrolls to the end and follows the answer. */
  scrollToEnd() {
    this.#follows = true;
    this.#follow();
  }

  #follow() {
    if (this.#follows) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#noteScroll();
  }

  #noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.#toEnd.hidden = this.#follows;
  }

  #welcome(modelText) {
    const suggestions = SUGGESTIONS.map((text) =>
      element("button", { type: "button", class: "suggestion", click: () => this.#onSuggestion(text) }, text),
    );
    return element(
      "div",
      { class: "welcome" },
      element("h2", {}, "What would you like to know?"),
      element("p", { class: "quiet" }, modelText),
      element("div", { class: "suggestions" }, suggestions),
    );
  }
}
