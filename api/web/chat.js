// The chat view: shows a conversation, sends messages and manages running answers, of which each conversation may have
// one at the same time.

import { Answer, newAnswer } from "./answer.js";
import { ConversationStore, newConversation, titleOf } from "./conversations.js";
import { byId, element, icon } from "./dom.js";
import { Drawer } from "./drawers.js";
import { number } from "./format.js";
import { currentKey, forgetKey } from "./keys.js";
import { growWith } from "./message-view.js";
import { ModelChoice } from "./models.js";
import { announce, notify } from "./notices.js";
import { lastSettings, SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const SAVE_MS = 2000;
/** How often a growing answer is saved. */
const HAS_KEYBOARD = matchMedia("not all and (pointer: coarse)");
/** On touch screens, a focused field opens a keyboard that covers half of the page. */

export class Chat {
  #store = new ConversationStore();
  #running = new Map();
  /** By conversation: {answer, savedAt}. */
  #current;
  #drafts = new Map();
  #input = byId("composer-input");
  #fitInput;
  #models = new ModelChoice(byId("model"));
  #settings = new SettingsPanel((settings) => this.#keepChoice({ settings }));
  #settingsDrawer = new Drawer("settings", { isBeside: false, width: 1080 });
  #sidebarDrawer = new Drawer("sidebar", { isBeside: true, width: 860 });
  #sidebar = new Sidebar(this.#store, {
    isRunning: (id) => this.#running.has(id),
    onRemove: (id) => this.#onRemove(id),
  });
  #thread = new Thread(
    {
      edit: (message, text) => this.#edit(message, text),
      regenerate: () => this.#regenerate(),
      sendResults: (results) => this.#sendResults(results),
    },
    (text) => this.#fill(text),
  );
  #saveTimer = 0;

  constructor() {
    this.#fitInput = growWith(this.#input);
    this.#current = newConversation("", lastSettings());
    this.#listen();
    this.#showKeyButton();
    this.loadModels();
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#input.addEventListener("keydown", (event) => {
      // In an input method, Enter confirms the composed word.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.#send();
    });
    this.#input.addEventListener("input", () => this.#showButtons());
    byId("stop").addEventListener("click", () => this.#stop());
    byId("new-chat").addEventListener("click", () => {
      location.hash = "#chat";
      this.open(null);
    });
    byId("forget-key").addEventListener("click", () => {
      forgetKey();
      notify("API key forgotten.");
    });
    document.addEventListener("keychange", () => this.#showKeyButton());
    document.addEventListener("keydown", (event) => this.#onEscape(event));
    this.#models.addEventListener("change", () => {
      this.#keepChoice({ model: this.#models.value });
      if (this.#current.messages.length === 0) this.#showThread();
    });
    this.#store.addEventListener("change", ({ detail }) => {
      if (detail.isForeign && detail.id === this.#current.id && !this.#running.has(detail.id)) this.open(detail.id);
    });
    addEventListener("pagehide", () => {
      for (const id of this.#running.keys()) this.#save(this.#running.get(id).conversation);
    });
  }

  #onEscape(event) {
    if (event.key !== "Escape" || document.querySelector("dialog[open]") !== null) return;
    if (this.#settingsDrawer.isOver) this.#settingsDrawer.close();
    else if (this.#sidebarDrawer.isOver) this.#sidebarDrawer.close();
    else this.#stop();
  }

  /** Fetches the list of models; shows a notice on failure. */
  async loadModels() {
    document.getElementById("connection")?.remove();
    try {
      await this.#models.load();
    } catch (error) {
      this.#models.showNone();
      const again = element(
        "button",
        { type: "button", class: "button small", click: () => this.loadModels() },
        "Try again",
      );
      const box = element("div", { class: "error-box", id: "connection", role: "alert" });
      box.append(icon("alert"), element("p", {}, error.message), again);
      byId("composer").prepend(box);
    }
  }

  // -- display -------------------------------------------------------------------------------------------------

  /** Shows a conversation, or a new one if the id is unknown. */
  open(id) {
    this.#drafts.set(this.#current.id, this.#input.value);
    const found = id === null ? null : (this.#running.get(id)?.conversation ?? this.#store.get(id));
    if (found === null && this.#current.messages.length === 0 && this.#current.id !== id) {
      // a new one is already shown
    } else {
      this.#current = found ?? newConversation(this.#models.value, lastSettings());
    }
    if (found === null && location.hash.startsWith("#chat/")) history.replaceState(null, "", "#chat");
    this.#models.choose(this.#current.model);
    this.#settings.show(this.#current.settings);
    this.#input.value = this.#drafts.get(this.#current.id) ?? "";
    this.#fitInput();
    this.#sidebar.select(this.#current.id);
    this.#sidebarDrawer.closeIfOver();
    this.#showThread();
    this.#thread.scrollToEnd();
    if (HAS_KEYBOARD.matches && byId("chat-view").hidden === false) this.#input.focus({ preventScroll: true });
  }

  #showThread() {
    const card = this.#models.card;
    const length = Number.isFinite(card?.max_model_len) ? `, ${number(card.max_model_len)}-token context` : "";
    this.#thread.show(this.#current.messages, card === undefined ? "" : `${card.id}${length}`);
    this.#showButtons();
    // The link from the dashboard leads back to the same conversation.
    const place = this.#current.messages.length > 0 ? `#chat/${this.#current.id}` : "#chat";
    for (const link of document.querySelectorAll("#bar a[href^='#chat']")) link.setAttribute("href", place);
  }

  #showButtons() {
    const isRunning = this.#running.has(this.#current.id);
    const hadFocus = document.activeElement;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("send").disabled = this.#input.value.trim() === "";
    byId("messages").setAttribute("aria-busy", String(isRunning));
    // The button that had the focus has been hidden.
    if (hadFocus === byId("send") || hadFocus === byId("stop")) this.#input.focus();
  }

  #showKeyButton() {
    byId("forget-key").hidden = currentKey() === null;
  }

  #fill(text) {
    this.#input.value = text;
    this.#fitInput();
    this.#showButtons();
    this.#input.focus();
  }

  // -- saving --------------------------------------------------------------------------------------------------

  /** Saves a choice of model or settings with the conversation. */
  #keepChoice(choice) {
    const conversation = this.#current;
    Object.assign(conversation, choice);
    if (conversation.messages.length === 0) return;
    clearTimeout(this.#saveTimer);
    this.#saveTimer = setTimeout(() => {
      if (this.#store.get(conversation.id) !== null) this.#save(conversation);
    }, 400);
  }

  #save(conversation) {
    const { removed, isKept } = this.#store.save(conversation);
    if (!isKept) notify("This conversation is too long to store in the browser. Export it to keep it.");
    else if (removed > 0) notify("The oldest conversations were removed to make room.");
  }

  #onRemove(id) {
    this.#stop(id);
    this.#running.delete(id);
    this.#drafts.delete(id);
    if (id === this.#current.id) {
      location.hash = "#chat";
      this.open(null);
    }
  }

  // -- sending -------------------------------------------------------------------------------------------------

  #send() {
    const text = this.#input.value;
    if (text.trim() === "" || this.#running.has(this.#current.id) || !this.#areSettingsValid()) return;
    const conversation = this.#current;
    if (conversation.messages.length === 0) {
      conversation.title ||= titleOf(text);
      history.replaceState(null, "", `#chat/${conversation.id}`);
    }
    conversation.messages.push({ role: "user", content: text });
    this.#fill("");
    if (!HAS_KEYBOARD.matches) this.#input.blur(); // the on-screen keyboard would cover the answer
    this.#start(conversation);
  }

  #areSettingsValid() {
    const invalid = this.#settings.firstInvalid();
    if (invalid === null) return true;
    this.#settingsDrawer.open();
    const details = invalid.closest("details");
    if (details !== null) details.open = true;
    invalid.focus();
    notify("A setting is invalid.");
    return false;
  }

  /** Starts an answer to the conversation. */
  async #start(conversation) {
    const { id } = conversation;
    conversation.model = this.#models.value || conversation.model;
    conversation.updated = Date.now();
    const message = newAnswer(conversation.model);
    const answer = new Answer(message, () => this.#onGrowth(id));
    conversation.messages.push(message);
    this.#running.set(id, { answer, conversation, savedAt: Date.now() });
    this.#save(conversation);
    this.#sidebar.select(this.#current.id);
    this.#showThread();
    this.#thread.scrollToEnd();
    announce("Answering");
    await answer.run(conversation);
    this.#onEnd(conversation, answer);
  }

  #onGrowth(id) {
    const run = this.#running.get(id);
    if (run === undefined) return;
    if (id === this.#current.id) this.#thread.updateSoon(run.answer.message, () => run.answer.rate);
    if (Date.now() - run.savedAt < SAVE_MS) return;
    run.savedAt = Date.now();
    this.#store.save(run.conversation);
  }

  #onEnd(conversation, answer) {
    const { id } = conversation;
    if (this.#running.get(id)?.answer !== answer) return; // removed or replaced in the meantime
    this.#running.delete(id);
    conversation.updated = Date.now();
    this.#save(conversation);
    if (id !== this.#current.id) return;
    const { message } = answer;
    this.#thread.update(message);
    this.#showButtons();
    const ends = { done: "Answer finished.", stopped: "Stopped." };
    if (message.status in ends) announce(`${ends[message.status]} ${message.content.slice(0, 300)}`);
  }

  /** Aborts the answer of a conversation immediately; the text so far is kept. */
  #stop(id = this.#current.id) {
    const run = this.#running.get(id);
    if (run === undefined) return;
    run.answer.stop();
    this.#onEnd(run.conversation, run.answer);
  }

  // -- editing messages ----------------------------------------------------------------------------------------

  #edit(message, text) {
    const conversation = this.#current;
    if (message.role === "assistant") {
      Object.assign(message, { content: text, stats: null, finishReason: null, isEdited: true }); // outdated
      this.#save(conversation);
      this.#thread.update(message);
      return;
    }
    const index = conversation.messages.indexOf(message);
    if (index < 0 || !this.#areSettingsValid()) return;
    this.#replaceFrom(index, [{ role: "user", content: text }], "Later messages were replaced.");
  }

  #regenerate() {
    const { messages } = this.#current;
    if (messages.at(-1)?.role !== "assistant" || !this.#areSettingsValid()) return;
    const hadText = messages.at(-1).content !== "";
    this.#replaceFrom(messages.length - 1, [], hadText ? "The answer was replaced." : null);
  }

  /** Replaces all messages from an index on, and starts a new answer. */
  #replaceFrom(index, messages, notice) {
    const conversation = this.#current;
    this.#stop();
    const before = conversation.messages;
    conversation.messages = [...before.slice(0, index), ...messages];
    this.#start(conversation);
    if (notice === null) return;
    const undo = () => {
      this.#stop(conversation.id);
      conversation.messages = before;
      this.#save(conversation);
      if (conversation.id === this.#current.id) this.#showThread();
    };
    notify(notice, { label: "Undo", run: undo });
  }

  #sendResults(results) {
    const conversation = this.#current;
    const calls = conversation.messages.at(-1).toolCalls;
    for (const [i, content] of results.entries()) {
      conversation.messages.push({ role: "tool", toolCallId: calls[i].id, content });
    }
    this.#start(conversation);
  }
}
