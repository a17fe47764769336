// The model selector: lists /v1/models, with adapters below their base model.

import { getJson } from "./api.js";
import { element } from "./dom.js";
import { number } from "./format.js";

/** Whether a model takes images, by its card in /v1/models. */
export function takesImages(card) {
  return card?.capabilities?.vision === true;
}

/** The select element with the models. */
export class ModelChoice extends EventTarget {
  #select;
  #cards = new Map();
  #wanted = "";

  constructor(select) {
    super();
    this.#select = select;
    select.addEventListener("change", () => {
      this.#wanted = select.value;
      this.#describe();
      this.dispatchEvent(new Event("change"));
    });
  }

  /** The model name to send; "" while none is known. */
  get value() {
    return this.#cards.has(this.#select.value) ? this.#select.value : "";
  }

  /** The card of the selected model, or undefined. */
  get card() {
    return this.#cards.get(this.value);
  }

  /** Selects a model; does nothing if it does not exist. */
  choose(name) {
    this.#wanted = name;
    if (this.#cards.has(name)) this.#select.value = name;
    this.#describe();
  }

  /** @throws {ApiError} The list cannot be fetched. */
  async load() {
    const { data } = await getJson("v1/models", { quiet: this.#cards.size > 0 });
    const cards = data.filter((card) => typeof card?.id === "string");
    this.#cards = new Map(cards.map((card) => [card.id, card]));
    const bases = cards.filter((card) => !card.parent);
    const options = bases.map((card) => option(card));
    for (const base of new Set(cards.map((card) => card.parent).filter(Boolean))) {
      const adapters = cards.filter((card) => card.parent === base);
      options.push(element("optgroup", { label: `Adapters for ${base}` }, adapters.map(option)));
    }
    this.#select.replaceChildren(...options);
    this.#select.disabled = cards.length === 0;
    this.choose(this.#wanted);
    this.dispatchEvent(new Event("change"));
  }

  /** Fetches the list again, if there was one. On failure the old list stays. */
  async reload() {
    if (this.#cards.size > 0) await this.load().catch(() => {});
  }

  /** Shows that there is no model to select. */
  showNone() {
    if (this.#cards.size === 0) this.#select.replaceChildren(element("option", {}, "No model"));
  }

  #describe() {
    const length = this.card?.max_model_len;
    this.#select.title = Number.isFinite(length) ? `${this.value}: ${number(length)}-token context` : this.value;
  }
}

function option(card) {
  return element("option", { value: card.id }, card.id);
}
