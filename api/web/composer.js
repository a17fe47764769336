// The field to write in, with what is attached, and a draft for each conversation.

import { attachmentList } from "./attachment-view.js";
import { AttachmentError, MAX_ATTACHMENTS, readFile } from "./attachments.js";
import { newId } from "./conversations.js";
import { byId, setLabel } from "./dom.js";
import { growWith } from "./message-view.js";
import { announce, notify } from "./notices.js";

export class Composer {
  #input = byId("composer-input");
  #place = byId("composer-attachments");
  #picker = byId("file-picker");
  #hint = byId("drop-hint");
  #fit;
  #files;
  #actions;
  #drafts = new Map();
  /** By conversation: {text, attachments, numReading}. */
  #draft = newDraft();
  #isRunning = false;
  #takesImages = false;

  /**
   * @param {FileStore} files
   * @param {object} actions `send()`, called on Enter too.
   */
  constructor(files, actions) {
    this.#files = files;
    this.#actions = actions;
    this.#fit = growWith(this.#input);
    this.#listen();
    this.#listenToDrops();
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#actions.send();
    });
    this.#input.addEventListener("keydown", (event) => {
      // In an input method, Enter confirms the composed word.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.#actions.send();
    });
    this.#input.addEventListener("input", () => this.#showButtons());
    this.#input.addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData;
      // Office programs add an image of the copied text.
      if (files.length === 0 || types.includes("text/plain")) return;
      event.preventDefault();
      this.#attach(files);
    });
    byId("attach").addEventListener("click", () => this.#picker.click());
    this.#picker.addEventListener("change", async () => {
      await this.#attach(this.#picker.files);
      this.#picker.value = ""; // the same file may be chosen again
    });
  }

  #listenToDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;
    const talk = byId("talk");
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault(); // the browser would leave the page to show the file
      const isInside = talk.contains(event.target);
      event.dataTransfer.dropEffect = isInside ? "copy" : "none";
      this.#hint.hidden = !isInside;
    });
    addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) this.#hint.hidden = true;
    });
    addEventListener("drop", (event) => {
      this.#hint.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      if (talk.contains(event.target)) this.#attach(event.dataTransfer.files);
    });
  }

  /** Whether the model takes images. */
  set takesImages(takesImages) {
    this.#takesImages = takesImages;
    const label = takesImages ? "Attach images or text files" : "Attach text files";
    setLabel(byId("attach"), label);
    this.#hint.textContent = takesImages ? "Drop images or text files here" : "Drop text files here";
  }

  /** Whether an answer to the conversation is running. */
  set isRunning(isRunning) {
    this.#isRunning = isRunning;
    this.#showButtons();
  }

  get text() {
    return this.#input.value;
  }

  /** Whether there is something to send, and nothing is still being read. */
  get isReady() {
    const { attachments, numReading } = this.#draft;
    return numReading === 0 && (this.text.trim() !== "" || attachments.length > 0);
  }

  /** Shows the draft of a conversation, and keeps the one that was shown. */
  show(id) {
    this.#draft.text = this.text;
    if (!this.#drafts.has(id)) this.#drafts.set(id, newDraft());
    this.#draft = this.#drafts.get(id);
    this.#showDraft();
  }

  forget(id) {
    this.#drafts.delete(id);
  }

  /** Empties the field. Returns its `text` and `attachments`. */
  take() {
    const { attachments } = this.#draft;
    const { text } = this;
    Object.assign(this.#draft, { text: "", attachments: [] });
    this.#showDraft();
    return { text, attachments };
  }

  /** Puts a text into the field, in place of what is selected there. */
  insert(text) {
    this.#input.focus();
    this.#input.setRangeText(text, this.#input.selectionStart, this.#input.selectionEnd, "end");
    this.#fit();
    this.#showButtons();
  }

  /** Replaces the text in the field. */
  fill(text) {
    this.#input.value = "";
    this.insert(text);
  }

  focus() {
    this.#input.focus({ preventScroll: true });
  }

  blur() {
    this.#input.blur();
  }

  async #attach(files) {
    const draft = this.#draft;
    const chosen = [...files];
    if (draft.attachments.length + chosen.length > MAX_ATTACHMENTS) {
      notify(`A message takes at most ${MAX_ATTACHMENTS} attachments.`);
      return;
    }
    draft.numReading++;
    this.#showButtons();
    for (const file of chosen) {
      try {
        draft.attachments.push(await this.#read(file));
      } catch (error) {
        notify(error instanceof AttachmentError ? error.message : `${file.name} cannot be read.`);
      }
    }
    draft.numReading--;
    if (draft !== this.#draft) return;
    this.#showDraft(false);
    announce(`${draft.attachments.length} attached`);
    this.focus();
  }

  async #read(file) {
    const { attachment, blob } = await readFile(file, this.#takesImages);
    if (blob === null) return attachment;
    const id = newId();
    const isKept = await this.#files.put(id, blob);
    if (!isKept) notify(`The browser's storage is full: ${attachment.name} is kept until you close the page.`);
    return { ...attachment, file: id };
  }

  #showDraft(withText = true) {
    const draft = this.#draft;
    if (withText) this.#input.value = draft.text;
    const remove = (attachment) => {
      draft.attachments = draft.attachments.filter((other) => other !== attachment);
      this.#showDraft(false);
      this.focus();
    };
    const list = attachmentList(draft.attachments, this.#files, remove);
    this.#place.replaceChildren(...(list === null ? [] : [list]));
    this.#fit();
    this.#showButtons();
  }

  #showButtons() {
    const hadFocus = document.activeElement;
    byId("send").hidden = this.#isRunning;
    byId("stop").hidden = !this.#isRunning;
    byId("send").disabled = !this.isReady;
    // The button that had the focus has been hidden.
    if (hadFocus === byId("send") || hadFocus === byId("stop")) this.#input.focus();
  }
}

function newDraft() {
  return { text: "", attachments: [], numReading: 0 };
}
