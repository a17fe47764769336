// The dashboard's table of models: those served, and their adapters, which may come and go.

import { getJson } from "./api.js";
import { element } from "./dom.js";
import { number } from "./format.js";
import { takesImages } from "./models.js";

const PERIOD_MS = 10_000;
/** How often the list is fetched while it is shown. */
const ADAPTERS = "vllm:lora_requests_info";

export class ModelList {
  /** The element to show. */
  node;
  #body = element("tbody");
  #cards = [];
  #fetchedAt = -Infinity;
  #shown = "";

  constructor() {
    const columns = ["Model", "Kind", "Context", "Takes", "Requests"];
    this.node = element(
      "section",
      { class: "card models", hidden: true },
      element("h2", {}, "Models"),
      element(
        "div",
        { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Models" },
        element(
          "table",
          {},
          element(
            "thead",
            {},
            element(
              "tr",
              {},
              columns.map((name) => element("th", { scope: "col" }, name)),
            ),
          ),
          this.#body,
        ),
      ),
    );
  }

  /** Fetches the list if it is old. Failures are shown by others. */
  async refresh() {
    if (performance.now() - this.#fetchedAt < PERIOD_MS) return;
    this.#fetchedAt = performance.now();
    try {
      const { data } = await getJson("v1/models", { quiet: true });
      this.#cards = data.filter((card) => typeof card?.id === "string");
    } catch {
      // the last list stays
    }
  }

  /** Shows the list, with the state of adapters from the metrics. */
  update(reading) {
    const states = adapterStates(reading);
    const rows = this.#cards.map((card) => describe(card, states.get(card.id) ?? ""));
    const text = JSON.stringify(rows);
    if (text === this.#shown) return; // what a user has selected stays
    this.#shown = text;
    this.node.hidden = rows.length === 0;
    this.#body.replaceChildren(
      ...rows.map(([name, ...values]) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, name),
          values.map((value) => element("td", {}, value)),
        ),
      ),
    );
  }
}

function describe(card, state) {
  const kind = card.parent ? `Adapter of ${card.parent}` : "Base model";
  const length = Number.isFinite(card.max_model_len) ? `${number(card.max_model_len)} tokens` : "–";
  return [card.id, kind, length, takesImages(card) ? "Text, images" : "Text", state];
}

/**
 * "running" or "waiting" by adapter. Other servers set the value to the time and keep old samples, so the samples with the
 * highest value count.
 */
export function adapterStates(reading) {
  const newest = reading.max(ADAPTERS);
  const samples = reading.all(ADAPTERS).filter(({ value }) => value === newest);
  const states = new Map();
  for (const state of ["waiting", "running"]) {
    const names = samples.flatMap(({ labels }) => (labels[`${state}_lora_adapters`] ?? "").split(","));
    for (const name of names) if (name !== "") states.set(name, state);
  }
  return states;
}
