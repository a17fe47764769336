// The chat view: shows a conversation, sends messages and manages running answers, of which each conversation may have
// one at the same time.

import { Answer, newAnswer, reopen } from "./answer.js";
import * as branches from "./branches.js";
import { Composer } from "./composer.js";
import { newConversation, titleOf } from "./conversations.js";
import { byId, element, icon } from "./dom.js";
import { Drawer } from "./drawers.js";
import { number } from "./format.js";
import { currentKey, forgetKey } from "./keys.js";
import { ModelChoice, takesImages } from "./models.js";
import { announce, notify } from "./notices.js";
import { PromptDialog } from "./prompts.js";
import { lastSettings, SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const SAVE_MS = 2000;
/** How often a growing answer is saved. */
const HAS_KEYBOARD = matchMedia("not all and (pointer: coarse)");
/** On touch screens, a focused field opens a keyboard that covers half of the page. */

export class Chat {
  #store;
  #running = new Map();
  /** By conversation: {answer, conversation, savedAt}. */
  #current;
  #composer;
  #models = new ModelChoice(byId("model"));
  #settings = new SettingsPanel((settings) => this.#keepChoice({ settings }));
  #settingsDrawer = new Drawer("settings", { isBeside: false, width: 1080 });
  #sidebarDrawer = new Drawer("sidebar", { isBeside: true, width: 860 });
  #sidebar;
  #thread;
  #saveTimer = 0;
  #wasFull = false;

  /** @param {ConversationStore} store */
  constructor(store) {
    this.#store = store;
    this.#composer = new Composer(store.files, { send: () => this.#send() });
    this.#sidebar = new Sidebar(store, {
      isRunning: (id) => this.#running.has(id),
      onRemove: (id) => this.#onRemove(id),
    });
    this.#thread = new Thread(
      {
        files: store.files,
        edit: (message, text, attachments) => this.#edit(message, text, attachments),
        regenerate: (message) => this.#regenerate(message),
        resume: (message) => this.#resume(message),
        choose: (message, name) => this.#choose(message, name),
        sendResults: (results) => this.#sendResults(results),
      },
      (text) => this.#composer.fill(text),
    );
    this.#current = newConversation("", lastSettings());
    this.#composer.show(this.#current.id);
    this.#listen();
    this.#listenToKeys();
    this.#showKeyButton();
    this.loadModels();
  }

  #listen() {
    byId("stop").addEventListener("click", () => this.#stop());
    byId("new-chat").addEventListener("click", () => this.#openNew());
    byId("prompts").addEventListener("click", () => this.#showPrompts());
    byId("forget-key").addEventListener("click", () => {
      forgetKey();
      notify("API key forgotten.");
    });
    document.addEventListener("keychange", () => this.#showKeyButton());
    this.#models.addEventListener("change", () => {
      this.#keepChoice({ model: this.#models.value });
      this.#composer.takesImages = takesImages(this.#models.card);
      if (this.#current.messages.length === 0) this.#showThread();
    });
    this.#store.addEventListener("change", ({ detail }) => {
      if (detail.isForeign && detail.id === this.#current.id && !this.#running.has(detail.id)) this.open(detail.id);
    });
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") this.#models.reload(); // adapters come and go
    });
    addEventListener("pagehide", () => {
      // The browser ends the requests, which is no error of the server's.
      for (const id of [...this.#running.keys()]) this.#stop(id);
    });
  }

  #listenToKeys() {
    document.addEventListener("keydown", (event) => {
      if (byId("chat-view").hidden || document.querySelector("dialog[open]") !== null) return;
      if (event.key === "Escape") this.#onEscape();
      else if (event.key === "k" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey) {
        event.preventDefault();
        this.#settingsDrawer.closeIfOver();
        this.#sidebarDrawer.open();
        byId("search").focus();
      }
    });
  }

  #onEscape() {
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

  /**
   * Shows a conversation, or a new one if the id is unknown.
   *
   * @param {?string} id
   * @param {?number} messageId A message to show and scroll to, in whatever branch it is.
   */
  open(id, messageId = null) {
    const found = id === null ? null : (this.#running.get(id)?.conversation ?? this.#store.get(id));
    if (found === null && this.#current.messages.length === 0 && this.#current.id !== id) {
      // a new one is already shown
    } else {
      this.#current = found ?? newConversation(this.#models.value, lastSettings());
    }
    const message = this.#current.messages.find((one) => one.id === messageId);
    if (message !== undefined) branches.choose(this.#current, message);
    if (location.hash.startsWith("#chat/")) history.replaceState(null, "", found === null ? "#chat" : `#chat/${id}`);
    this.#models.choose(this.#current.model);
    this.#composer.takesImages = takesImages(this.#models.card);
    this.#settings.show(this.#current.settings);
    this.#composer.show(this.#current.id);
    this.#sidebar.select(this.#current.id);
    this.#sidebarDrawer.closeIfOver();
    this.#showThread();
    if (message === undefined) this.#thread.scrollToEnd();
    else this.#thread.scrollTo(message);
    if (HAS_KEYBOARD.matches && byId("chat-view").hidden === false) this.#composer.focus();
  }

  /** Shows a new conversation. The address changes without an event, which would come after the next key. */
  #openNew() {
    if (location.hash !== "#chat") history.pushState(null, "", "#chat");
    this.open(null);
  }

  #showThread() {
    const card = this.#models.card;
    const length = Number.isFinite(card?.max_model_len) ? `, ${number(card.max_model_len)}-token context` : "";
    this.#thread.show(this.#current, card === undefined ? "" : `${card.id}${length}`);
    this.#showRunning();
    // The link from the dashboard leads back to the same conversation.
    const place = this.#current.messages.length > 0 ? `#chat/${this.#current.id}` : "#chat";
    for (const link of document.querySelectorAll("#bar a[href^='#chat']")) link.setAttribute("href", place);
  }

  #showRunning() {
    const isRunning = this.#running.has(this.#current.id);
    this.#composer.isRunning = isRunning;
    byId("messages").setAttribute("aria-busy", String(isRunning));
  }

  #showKeyButton() {
    byId("forget-key").hidden = currentKey() === null;
  }

  #showPrompts() {
    const dialog = new PromptDialog(this.#composer.text, {
      insert: (text) => this.#composer.insert(text),
      system: (text) => {
        this.#settings.setSystemPrompt(text);
        notify("The prompt is the system prompt of this conversation.");
      },
    });
    dialog.show();
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

  async #save(conversation) {
    const isKept = await this.#store.save(conversation);
    if (!isKept && !this.#wasFull) notify("The browser's storage is full. Export and delete some conversations.");
    this.#wasFull = !isKept;
  }

  #onRemove(id) {
    this.#stop(id);
    this.#running.delete(id);
    this.#composer.forget(id);
    if (id === this.#current.id) this.#openNew();
  }

  // -- sending -------------------------------------------------------------------------------------------------

  #send() {
    if (!this.#composer.isReady || this.#running.has(this.#current.id) || !this.#areSettingsValid()) return;
    const conversation = this.#current;
    const { text, attachments } = this.#composer.take();
    if (conversation.messages.length === 0) {
      conversation.title ||= titleOf(text.trim() === "" ? attachments[0].name : text);
      history.replaceState(null, "", `#chat/${conversation.id}`);
    }
    const last = branches.path(conversation).at(-1) ?? null;
    branches.add(conversation, last, userMessage(text, attachments));
    if (HAS_KEYBOARD.matches) this.#composer.focus();
    else this.#composer.blur(); // the on-screen keyboard would cover the answer
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

  /** Starts an answer to the last message that is shown. */
  #start(conversation) {
    conversation.model = this.#models.value || conversation.model;
    const message = newAnswer(conversation.model);
    branches.add(conversation, branches.path(conversation).at(-1), message);
    this.#run(conversation, message);
    this.#thread.scrollToEnd();
  }

  /** Lets an answer grow. */
  async #run(conversation, message) {
    const { id } = conversation;
    conversation.updated = Date.now();
    const answer = new Answer(message, () => this.#onGrowth(id));
    this.#running.set(id, { answer, conversation, savedAt: Date.now() });
    this.#save(conversation);
    this.#sidebar.select(this.#current.id);
    this.#showThread();
    announce("Answering");
    await answer.run(conversation, this.#store.files);
    this.#onEnd(conversation, answer);
  }

  #onGrowth(id) {
    const run = this.#running.get(id);
    if (run === undefined) return;
    if (id === this.#current.id) this.#thread.updateSoon(run.answer.message, () => run.answer.rate);
    if (Date.now() - run.savedAt < SAVE_MS) return;
    run.savedAt = Date.now();
    this.#save(run.conversation);
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
    this.#showRunning();
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

  // -- changing messages ---------------------------------------------------------------------------------------

  #edit(message, text, attachments) {
    const conversation = this.#current;
    if (message.role === "assistant") {
      Object.assign(message, { content: text, stats: null, finishReason: null, isEdited: true }); // outdated
      this.#save(conversation);
      this.#thread.update(message);
      return;
    }
    if (!this.#areSettingsValid()) return;
    this.#stop();
    branches.add(conversation, branches.before(conversation, message).at(-1) ?? null, userMessage(text, attachments));
    this.#start(conversation);
  }

  /** Starts another answer beside one, or in place of one that failed without a text. */
  #regenerate(message) {
    if (!this.#areSettingsValid()) return;
    const conversation = this.#current;
    this.#stop();
    const question = branches.before(conversation, message).at(-1) ?? null;
    if (isEmpty(message)) branches.remove(conversation, message);
    const answer = newAnswer(this.#models.value || conversation.model);
    branches.add(conversation, question, answer);
    conversation.model = answer.model;
    this.#run(conversation, answer);
    this.#thread.scrollToEnd();
  }

  #resume(message) {
    if (!this.#areSettingsValid() || this.#running.has(this.#current.id)) return;
    reopen(message);
    this.#run(this.#current, message);
    this.#thread.scrollToEnd();
  }

  /** Shows another version of a message, after a click on the button of that name. */
  #choose(message, name) {
    branches.choose(this.#current, message);
    this.#save(this.#current);
    this.#showThread();
    this.#thread.focusVersions(message, name);
  }

  #sendResults(results) {
    const conversation = this.#current;
    let last = branches.path(conversation).at(-1);
    const calls = last.toolCalls;
    for (const [i, content] of results.entries()) {
      last = branches.add(conversation, last, { role: "tool", toolCallId: calls[i].id, content });
    }
    this.#start(conversation);
  }
}

function userMessage(text, attachments) {
  return { role: "user", content: text, ...(attachments.length > 0 ? { attachments } : {}) };
}

function isEmpty({ content, reasoning, toolCalls }) {
  return content === "" && reasoning === "" && toolCalls.length === 0;
}
