// The view of a message. Answers can grow. All content is built from text nodes and elements, never from HTML.

import { attachmentList } from "./attachment-view.js";
import { copyButton, element, icon, iconButton } from "./dom.js";
import { number, seconds } from "./format.js";
import { MarkdownView } from "./markdown.js";

/**
 * @typedef {object} Actions Callbacks for the actions on a message.
 * @property {(message: object, text: string, attachments: object[]) => void} edit
 * @property {(message: object) => void} regenerate
 * @property {(message: object) => void} resume Continue the answer.
 * @property {(message: object) => void} choose Show this version of a message.
 * @property {(results: string[]) => void} sendResults
 * @property {FileStore} files Where the content of attachments is.
 */

export class MessageView {
  /** The element to show. */
  node;
  #message;
  #actions;
  #markdown;
  #body = element("div", { class: "message-body markdown" });
  #reasoning = null;
  #tools = element("div", { class: "tool-calls" });
  #numTools = 0;
  #foot = element("div", { class: "message-foot" });
  #attachments = null;
  #versions = [];

  /**
   * @param {object} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.#message = message;
    this.#actions = actions;
    const speaker = { user: "You", tool: "Tool result" }[message.role] ?? "Answer";
    this.node = element(
      "article",
      { class: `message from-${message.role}`, "aria-label": speaker },
      this.#body,
      this.#tools,
      this.#foot,
    );
    if (message.role === "assistant") this.#markdown = new MarkdownView(this.#body);
    this.#attachments = attachmentList(message.attachments ?? [], actions.files);
    if (this.#attachments !== null) this.#body.before(this.#attachments);
    this.update();
  }

  /** Sets the versions of the message, itself included. Returns whether they have changed. */
  setVersions(versions) {
    const isSame = versions.length === this.#versions.length && versions.every((one, i) => one === this.#versions[i]);
    this.#versions = versions;
    return !isSame;
  }

  /** Moves the focus to a button that shows another version: `previous` or `next`. */
  focusVersions(name) {
    const buttons = [...this.#foot.querySelectorAll(".versions button")];
    (
      buttons.find((button) => button.dataset.name === name && !button.disabled) ?? buttons.find((b) => !b.disabled)
    )?.focus();
  }

  /**
   * Updates the view from the message.
   *
   * @param {object} options `rate`: tokens per second while it grows; `isLast`: whether it is the last message.
   */
  update({ rate = NaN, isLast = false } = {}) {
    const message = this.#message;
    const isStreaming = message.status === "streaming";
    this.node.classList.toggle("is-streaming", isStreaming);
    this.node.classList.toggle("is-last", isLast);
    if (message.role === "assistant") {
      this.#showReasoning(isStreaming);
      this.#markdown.update(message.content);
      this.#showTools(isStreaming);
    } else {
      this.#body.classList.remove("markdown");
      this.#body.textContent = message.content;
      this.#body.hidden = message.role === "user" && message.content === "";
    }
    this.#showFoot(isStreaming, rate, isLast);
  }

  /** Shows the reasoning, collapsed by default; once opened, it stays open until the user closes it. */
  #showReasoning(isStreaming) {
    const { reasoning, content } = this.#message;
    if (reasoning === "") return;
    if (this.#reasoning === null) {
      const label = element("span", {});
      const text = element("div", { class: "reasoning-text markdown" });
      const details = element("details", { class: "reasoning" }, element("summary", {}, icon("thought"), label), text);
      this.#reasoning = { label, details, view: new MarkdownView(text) };
      this.#body.before(details);
      details.addEventListener("toggle", () => {
        if (details.open) this.#reasoning.view.update(this.#message.reasoning);
      });
    }
    const { label, details, view } = this.#reasoning;
    label.textContent = isStreaming && content === "" ? "Thinking" : "Reasoning";
    details.classList.toggle("is-growing", isStreaming && content === "");
    if (details.open) view.update(reasoning);
  }

  #showTools(isStreaming) {
    const calls = this.#message.toolCalls;
    if (calls.length === 0 || (!isStreaming && this.#numTools === calls.length && !this.#tools.dataset.grows)) return;
    this.#tools.replaceChildren(...calls.map(toolCall));
    this.#numTools = calls.length;
    if (isStreaming) this.#tools.dataset.grows = "yes";
    else delete this.#tools.dataset.grows;
  }

  #showFoot(isStreaming, rate, isLast) {
    const message = this.#message;
    if (isStreaming) {
      const speed = Number.isFinite(rate) ? `${number(rate)} tokens/s` : "";
      const waiting = message.content === "" && message.reasoning === "" && message.toolCalls.length === 0;
      // Only the text changes between tokens.
      if (this.#foot.dataset.grows === "yes") this.#foot.lastChild.textContent = speed;
      else this.#foot.replaceChildren(dots(), element("span", { class: "stats" }, speed));
      this.#foot.dataset.grows = "yes";
      this.#foot.firstChild.classList.toggle("is-waiting", waiting);
      return;
    }
    delete this.#foot.dataset.grows;
    const parts = message.role === "assistant" ? this.#answerFoot(isLast) : this.#userFoot();
    this.#foot.replaceChildren(...parts.filter((part) => part !== null));
  }

  #userFoot() {
    if (this.#message.role === "tool") return [];
    return [
      this.#versionButtons(),
      element(
        "div",
        { class: "message-buttons" },
        copyButton("Copy message", () => this.#message.content),
        iconButton("edit", "Edit message", () => this.#edit()),
      ),
    ];
  }

  /** "‹ 1 / 2 ›", or null for a message without alternatives. */
  #versionButtons() {
    const [index, length] = [this.#versions.indexOf(this.#message), this.#versions.length];
    if (length < 2) return null;
    const step = (name, label, target) =>
      iconButton(name, label, () => this.#actions.choose(target, name), {
        class: "icon-button tiny",
        "data-name": name,
        disabled: target === undefined,
      });
    return element(
      "div",
      { class: "versions", role: "group", "aria-label": `Version ${index + 1} of ${length}` },
      step("previous", "Previous version", this.#versions[index - 1]),
      element("span", { "aria-hidden": "true" }, `${index + 1} / ${length}`),
      step("next", "Next version", this.#versions[index + 1]),
    );
  }

  #answerFoot(isLast) {
    const message = this.#message;
    const buttons = element(
      "div",
      { class: "message-buttons" },
      message.content === "" ? null : copyButton("Copy answer", () => message.content),
      message.content === "" ? null : iconButton("edit", "Edit answer", () => this.#edit()),
      isLast && message.status === "error"
        ? null // the error has a button to try again
        : iconButton("refresh", "Regenerate answer", () => this.#actions.regenerate(message)),
      isLast && canGoOn(message) ? iconButton("resume", "Continue answer", () => this.#actions.resume(message)) : null,
    );
    const results = isLast ? this.#resultsForm() : null;
    return [this.#errorBox(isLast), results, this.#versionButtons(), buttons, stats(message)];
  }

  #errorBox(isLast) {
    const { status, error } = this.#message;
    if (status !== "error") return null;
    const again = isLast
      ? element(
          "button",
          { type: "button", class: "button small", click: () => this.#actions.regenerate(this.#message) },
          "Try again",
        )
      : null;
    return element("div", { class: "error-box", role: "alert" }, icon("alert"), element("p", {}, error), again);
  }

  /** For tool calls of the last answer, shows fields for the results to send back. */
  #resultsForm() {
    const { toolCalls, status } = this.#message;
    if (toolCalls.length === 0 || status !== "done") return null;
    const areas = toolCalls.map((call) =>
      element("textarea", { rows: 2, class: "code-input", "aria-label": `Result of ${call.name}` }),
    );
    return element(
      "form",
      {
        class: "tool-results",
        submit: (event) => {
          event.preventDefault();
          this.#actions.sendResults(areas.map((area) => area.value));
        },
      },
      toolCalls.map((call, i) => [element("p", { class: "quiet small" }, `Result of ${call.name}`), areas[i]]),
      element("button", { type: "submit", class: "button small" }, "Send results"),
    );
  }

  #edit() {
    const message = this.#message;
    const isUser = message.role === "user";
    const area = element("textarea", { "aria-label": "Message", rows: 1 });
    area.value = message.content;
    let attachments = message.attachments ?? [];
    const place = element("div", {});
    const showAttachments = () => {
      const list = attachmentList(attachments, this.#actions.files, (removed) => {
        attachments = attachments.filter((other) => other !== removed);
        showAttachments();
        area.focus();
      });
      place.replaceChildren(...(list === null ? [] : [list]));
    };
    showAttachments();
    const close = () => {
      form.remove();
      this.node.classList.remove("is-editing");
      this.#foot.querySelector("button")?.focus();
    };
    const save = () => {
      const text = area.value;
      if (text.trim() === "" && attachments.length === 0) return;
      close();
      if (text !== message.content || isUser) this.#actions.edit(message, text, attachments);
    };
    const form = element(
      "form",
      {
        class: "edit-form",
        submit: (event) => {
          event.preventDefault();
          save();
        },
        keydown: (event) => {
          if (event.isComposing) return;
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
          } else if (event.key === "Enter" && !event.shiftKey && (isUser || event.ctrlKey || event.metaKey)) {
            if (event.target !== area) return;
            event.preventDefault();
            save();
          }
        },
      },
      place,
      area,
      element(
        "div",
        { class: "dialog-buttons" },
        element("button", { type: "button", class: "button small", click: close }, "Cancel"),
        element("button", { type: "submit", class: "button small primary" }, isUser ? "Send" : "Save"),
      ),
    );
    this.node.classList.add("is-editing");
    this.node.append(form);
    growWith(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** Whether an answer ended before the model was done, or has been changed since. */
function canGoOn({ content, toolCalls, status, finishReason, isEdited }) {
  if (content.trim() === "" || toolCalls.length > 0) return false;
  return status !== "done" || finishReason !== "stop" || isEdited === true;
}

/** Fits the height of a text area to its text, up to the maximum height in the style sheet. */
export function growWith(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", fit);
  fit();
  return fit;
}

function dots() {
  return element("span", { class: "dots", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
}

function toolCall({ name, arguments: text }) {
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // incomplete or not JSON
  }
  return element(
    "div",
    { class: "tool-call" },
    element("p", {}, icon("tool"), element("span", {}, "Call to ", element("strong", {}, name || "a tool"))),
    shown.trim() === "" ? null : element("pre", { tabindex: "0" }, element("code", {}, shown)),
  );
}

const REASONS = {
  length: "stopped at the length limit",
  tool_calls: "calls a tool",
  content_filter: "filtered",
  abort: "aborted",
};

/** The statistics of an answer. */
function stats({ stats: values, status, finishReason, model, isEdited }) {
  const parts = isEdited ? ["edited"] : [];
  if (values !== null) {
    parts.push(`${number(values.tokens)} token${values.tokens === 1 ? "" : "s"}`);
    if (values.rate) parts.push(`${number(values.rate)} tokens/s`);
    if (Number.isFinite(values.firstToken)) parts.push(`first token after ${seconds(values.firstToken)}`);
  }
  if (status === "stopped" && !isEdited) parts.push("stopped");
  else if (finishReason !== null && finishReason in REASONS) parts.push(REASONS[finishReason]);
  if (parts.length === 0) return null;
  const more = [model];
  if (Number.isFinite(values?.promptTokens)) more.push(`${number(values.promptTokens)} prompt tokens`);
  if (values?.cachedTokens) more.push(`${number(values.cachedTokens)} of them from the prefix cache`);
  return element("span", { class: "stats", title: more.filter(Boolean).join(", ") }, parts.join(" · "));
}
