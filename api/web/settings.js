// The settings panel, with the system prompt and sampling parameters, and the resulting request fields. An empty field
// is not sent, so the server uses the model's default.

import { byId, element, iconButton } from "./dom.js";
import * as storage from "./storage.js";

const NAME = "settings";

/** Numeric settings. `slider`: the range of its slider, if it has one. */
const NUMBERS = [
  {
    name: "temperature",
    label: "Temperature",
    hint: "0 always picks the most likely token. Higher values add variety.",
    min: 0,
    max: 2,
    step: 0.05,
    start: 1,
    slider: true,
  },
  {
    name: "top_p",
    label: "Top P",
    hint: "Sample from the most likely tokens with this total probability.",
    min: 0,
    max: 1,
    step: 0.01,
    start: 1,
    slider: true,
  },
  {
    name: "min_p",
    label: "Min P",
    hint: "Minimum probability relative to the most likely token.",
    min: 0,
    max: 1,
    step: 0.01,
    start: 0,
    slider: true,
  },
  {
    name: "top_k",
    label: "Top K",
    hint: "Sample from this many tokens; 0 for all.",
    min: -1,
    step: 1,
    group: "sampling",
  },
  { name: "seed", label: "Seed", hint: "The same seed gives the same answer.", step: 1, group: "sampling" },
  {
    name: "max_completion_tokens",
    label: "Max tokens",
    hint: "Includes reasoning.",
    min: 1,
    step: 1,
    group: "sampling",
  },
  {
    name: "presence_penalty",
    label: "Presence",
    hint: "Penalises tokens already used.",
    min: -2,
    max: 2,
    step: 0.1,
    group: "penalties",
  },
  {
    name: "frequency_penalty",
    label: "Frequency",
    hint: "Penalises tokens by how often they were used.",
    min: -2,
    max: 2,
    step: 0.1,
    group: "penalties",
  },
  {
    name: "repetition_penalty",
    label: "Repetition",
    hint: "Above 1 discourages repetition, including of the prompt.",
    min: 0.01,
    step: 0.05,
    group: "penalties",
  },
];

const RESERVED = new Set(["messages", "stream", "stream_options", "model"]);

/** Settings of new conversations: those used last. */
export function lastSettings() {
  const value = storage.readJson(NAME);
  return value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
}

/** The request fields that correspond to settings. */
export function bodyFields(settings) {
  const fields = {};
  for (const { name } of NUMBERS) if (Number.isFinite(settings[name])) fields[name] = settings[name];
  const stop = stopStrings(settings.stop ?? "");
  if (stop.length > 0) fields.stop = stop;
  return { ...fields, ...extraFields(settings.extra ?? "").fields };
}

/** Lines of a text; \n and \t in them are unescaped to a line break and a tab. */
export function stopStrings(text) {
  const escapes = { n: "\n", t: "\t", r: "\r" };
  const lines = String(text)
    .split("\n")
    .filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\(.)/g, (_, char) => escapes[char] ?? char));
}

/** Parses a text as a JSON object; `problem` says why it is invalid. */
function extraFields(text) {
  if (String(text).trim() === "") return { fields: {}, problem: null };
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return { fields: {}, problem: "This is not valid JSON." };
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    return { fields: {}, problem: 'This must be a JSON object, such as {"ignore_eos": true}.' };
  }
  const reserved = Object.keys(value).find((name) => RESERVED.has(name));
  if (reserved !== undefined) return { fields: {}, problem: `"${reserved}" is set by the page.` };
  return { fields: value, problem: null };
}

/** The settings panel. `onChange` is called with all settings whenever one has changed. */
export class SettingsPanel {
  #settings = {};
  #onChange;
  #show = [];
  /** Functions that update the controls from the settings. */

  constructor(onChange) {
    this.#onChange = onChange;
    byId("settings-body").append(
      this.#textField("system", "System prompt", {
        rows: 5,
        placeholder: "How the model should behave",
      }),
      element("h3", {}, "Sampling"),
      ...NUMBERS.filter((number) => number.slider).map((number) => this.#slider(number)),
      this.#numberGrid("sampling"),
      element("h3", {}, "Penalties"),
      this.#numberGrid("penalties"),
      element("h3", {}, "Stopping"),
      this.#textField("stop", "Stop strings", { rows: 2, code: true, hint: "One per line; \\n is a line break." }),
      element(
        "details",
        { class: "more" },
        element("summary", {}, "More fields"),
        this.#textField("extra", "Request fields as JSON", {
          rows: 5,
          code: true,
          placeholder: '{"ignore_eos": true}',
          hint: "Added to each request, such as tools, response_format or chat_template_kwargs.",
          problem: (text) => extraFields(text).problem,
        }),
      ),
      element(
        "button",
        { type: "button", class: "button wide", id: "settings-reset", click: () => this.#reset() },
        "Reset to server defaults",
      ),
    );
  }

  /** Shows the settings of a conversation. */
  show(settings) {
    this.#settings = { ...settings };
    for (const show of this.#show) show();
    this.#mark();
  }

  get settings() {
    return { ...this.#settings };
  }

  setSystemPrompt(text) {
    this.#set("system", text);
    for (const show of this.#show) show();
  }

  /** The first field with an invalid value, or null. */
  firstInvalid() {
    return document.querySelector("#settings-body [aria-invalid=true]");
  }

  #set(name, value) {
    if (value === null || value === "") delete this.#settings[name];
    else this.#settings[name] = value;
    storage.writeJson(NAME, this.#settings);
    this.#mark();
    this.#onChange(this.settings);
  }

  /** Shows a dot on the panel's button if any setting is set. */
  #mark() {
    byId("settings-toggle").classList.toggle("is-marked", Object.keys(this.#settings).length > 0);
  }

  #reset() {
    this.#settings = {};
    storage.writeJson(NAME, {});
    for (const show of this.#show) show();
    this.#mark();
    this.#onChange(this.settings);
  }

  #numberInput({ name, min, max, step }) {
    const id = `setting-${name}`;
    const input = element("input", {
      id,
      type: "number",
      inputmode: step === 1 && !(min < 0) ? "numeric" : "decimal",
      min,
      max,
      step: step === 1 ? 1 : "any",
      placeholder: "auto",
      autocomplete: "off",
      "aria-describedby": `${id}-hint`,
    });
    const check = () => {
      const { value } = input;
      const isSafe = step !== 1 || value === "" || Number.isSafeInteger(Number(value));
      const isValid = input.validity.valid && isSafe;
      input.setAttribute("aria-invalid", String(!isValid));
      return isValid;
    };
    input.addEventListener("input", () => {
      if (check()) this.#set(name, input.value === "" ? null : Number(input.value));
    });
    const show = () => {
      input.value = Number.isFinite(this.#settings[name]) ? String(this.#settings[name]) : "";
      check();
    };
    this.#show.push(show);
    return { id, input, show };
  }

  #slider(number) {
    const { name, label, hint, min, max, step, start } = number;
    const { id, input, show } = this.#numberInput(number);
    const range = element("input", { type: "range", min, max, step, "aria-label": label });
    const clear = iconButton(
      "close",
      `Use the server's default for ${label}`,
      () => {
        this.#set(name, null);
        show();
        follow();
        input.focus();
      },
      { class: "icon-button tiny" },
    );
    const follow = () => {
      const isSet = Number.isFinite(this.#settings[name]);
      range.value = String(isSet ? this.#settings[name] : start);
      range.classList.toggle("is-auto", !isSet);
      clear.classList.toggle("is-gone", !isSet);
      range.setAttribute("aria-valuetext", isSet ? String(this.#settings[name]) : "server default");
    };
    range.addEventListener("input", () => {
      this.#set(name, Number(range.value));
      show();
      follow();
    });
    input.addEventListener("input", follow);
    this.#show.push(follow);
    return element(
      "div",
      { class: "setting" },
      element("div", { class: "setting-head" }, element("label", { for: id }, label), clear, input),
      range,
      element("p", { class: "hint", id: `${id}-hint` }, hint),
    );
  }

  #numberGrid(group) {
    const fields = NUMBERS.filter((number) => number.group === group).map((number) => {
      const { id, input } = this.#numberInput(number);
      return element(
        "div",
        { class: "setting", title: number.hint },
        element("label", { for: id }, number.label),
        input,
        element("p", { class: "visually-hidden", id: `${id}-hint` }, number.hint),
      );
    });
    return element("div", { class: "setting-grid" }, fields);
  }

  #textField(name, label, { rows, placeholder = null, hint = null, code = false, problem = () => null }) {
    const id = `setting-${name}`;
    const area = element("textarea", {
      id,
      rows,
      placeholder,
      class: code ? "code-input" : null,
      spellcheck: code ? "false" : null,
      "aria-describedby": `${id}-hint`,
    });
    const note = element("p", { class: "hint", id: `${id}-hint` }, hint);
    const check = () => {
      const text = problem(area.value);
      area.setAttribute("aria-invalid", String(text !== null));
      note.textContent = text ?? hint ?? "";
      note.classList.toggle("error-text", text !== null);
    };
    area.addEventListener("input", () => {
      check();
      this.#set(name, area.value);
    });
    this.#show.push(() => {
      area.value = typeof this.#settings[name] === "string" ? this.#settings[name] : "";
      check();
    });
    return element("div", { class: "setting" }, element("label", { for: id }, label), area, note);
  }
}
