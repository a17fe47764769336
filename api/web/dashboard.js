// The dashboard: plots of /metrics, which is polled every second while the view is visible.

import { request } from "./api.js";
import { element, icon } from "./dom.js";
import { number, percent, seconds, short } from "./format.js";
import { askForKey, currentKey } from "./keys.js";
import { ModelList } from "./model-list.js";
import { Plot } from "./plot.js";
import { increase, newBuckets, quantile, Reading, rate } from "./prometheus.js";

const PERIOD_MS = 1000;
const SPANS = { "1 min": 60, "5 min": 300, "15 min": 900 };
const MAX_SPAN = 900;
/** Seconds for which samples are kept. */
const RATE_SPAN = 2;
/** Seconds over which rates are computed: counters change only at the end of a step. */
const LATENCY_SPAN = 10;
/** Seconds over which percentiles are computed: a single second may have no request. */

const M = {
  running: "vllm:num_requests_running",
  waiting: "vllm:num_requests_waiting",
  kvUsage: "vllm:kv_cache_usage_perc",
  queries: "vllm:prefix_cache_queries_total",
  hits: "vllm:prefix_cache_hits_total",
  output: "vllm:generation_tokens_total",
  prompt: "vllm:prompt_tokens_total",
  firstToken: "vllm:time_to_first_token_seconds",
  interToken: "vllm:inter_token_latency_seconds",
  endToEnd: "vllm:e2e_request_latency_seconds",
  queue: "vllm:request_queue_time_seconds",
  finished: "vllm:request_success_total",
  preemptions: "vllm:num_preemptions_total",
  restarts: "octavo:engine_restarts_total",
  drafts: "vllm:spec_decode_num_draft_tokens_total",
  accepted: "vllm:spec_decode_num_accepted_tokens_total",
  cache: "vllm:cache_config_info",
};

const TILES = {
  running: "Running",
  waiting: "Waiting",
  output: "Tokens/s out",
  prompt: "Tokens/s in",
  kvUsage: "KV cache in use",
  hitRate: "Prefix cache hits",
  acceptance: "Drafts accepted",
};

export class Dashboard {
  #root;
  #isShown = false;
  #timer = 0;
  #readings = [];
  /** {time, reading, values}: metrics, and the values plotted from them. `reading` is null for old samples. */
  #span = 60;
  #tiles = {};
  #plots = [];
  #models = new ModelList();
  #totals = element("dl", { class: "totals" });
  #problem = element("div", { class: "error-box", role: "alert", hidden: true });

  constructor(root) {
    this.#root = root;
    this.#build();
    document.addEventListener("visibilitychange", () => this.#goOn());
  }

  /** Whether the view is shown. Metrics are only fetched while it is. */
  set isShown(isShown) {
    this.#isShown = isShown;
    this.#goOn();
  }

  // -- polling -------------------------------------------------------------------------------------------------

  #goOn() {
    clearTimeout(this.#timer);
    if (this.#isShown && document.visibilityState === "visible") this.#poll();
  }

  async #poll() {
    clearTimeout(this.#timer);
    const begin = performance.now();
    try {
      const response = await request("metrics", { quiet: true });
      this.#add(new Reading(await response.text(), performance.now() / 1000));
      this.#problem.hidden = true;
      await this.#models.refresh();
    } catch (error) {
      this.#showProblem(error);
    }
    this.#show();
    if (!this.#isShown || document.visibilityState !== "visible") return;
    const pause = Math.max(100, PERIOD_MS - (performance.now() - begin));
    clearTimeout(this.#timer); // another poll may have started in the meantime
    this.#timer = setTimeout(() => this.#poll(), pause);
  }

  #add(reading) {
    const readings = this.#readings;
    const values = this.#derive(reading);
    readings.push({ time: reading.time, reading, values });
    while (readings[0].time < reading.time - MAX_SPAN) readings.shift();
    // A reading has thousands of objects, and is only needed to compute differences.
    for (const old of readings) if (old.time < reading.time - 2 * LATENCY_SPAN) old.reading = null;
  }

  /** The newest earlier reading of about that age, or else the oldest; null if there is none. */
  #before(reading, age) {
    const usable = this.#readings.filter((old) => old.reading !== null);
    const old = usable.filter(({ time }) => time <= reading.time - age + PERIOD_MS / 2000);
    return (old.at(-1) ?? usable[0])?.reading ?? null;
  }

  #derive(reading) {
    const recent = this.#before(reading, RATE_SPAN);
    const older = this.#before(reading, LATENCY_SPAN);
    const perSecond = (name) => (recent === null ? NaN : rate(name, recent, reading));
    const percentiles = (name) => {
      if (older === null) return [NaN, NaN];
      const buckets = newBuckets(name, older, reading);
      return [quantile(0.5, buckets), quantile(0.95, buckets)];
    };
    const queries = older === null ? NaN : increase(M.queries, older, reading);
    const drafts = older === null ? NaN : increase(M.drafts, older, reading);
    return {
      running: reading.sum(M.running),
      waiting: reading.sum(M.waiting),
      kvUsage: reading.max(M.kvUsage),
      hitRate: queries > 0 ? increase(M.hits, older, reading) / queries : NaN,
      acceptance: drafts > 0 ? increase(M.accepted, older, reading) / drafts : NaN,
      output: perSecond(M.output),
      prompt: perSecond(M.prompt),
      firstToken: percentiles(M.firstToken),
      interToken: percentiles(M.interToken),
      endToEnd: percentiles(M.endToEnd),
    };
  }

  // -- display -------------------------------------------------------------------------------------------------

  #build() {
    const latency = { series: ["median", "95 %"], format: seconds, note: `Requests in the last ${LATENCY_SPAN} s.` };
    const plots = [
      [
        { title: "Throughput", series: ["out", "in"], format: short, limit: 10, note: "Tokens per second." },
        (v) => [v.output, v.prompt],
      ],
      [
        { title: "Requests", series: ["running", "waiting"], format: short, limit: 4, note: "Current number." },
        (v) => [v.running, v.waiting],
      ],
      [{ ...latency, title: "Time to first token" }, (v) => v.firstToken],
      [
        { ...latency, title: "Time between tokens", note: `Tokens in the last ${LATENCY_SPAN} s.` },
        (v) => v.interToken,
      ],
      [
        {
          title: "Cache",
          series: ["KV in use", "prefix hits"],
          format: percent,
          isShare: true,
          note: `KV: share of blocks; prefix: share of prompt tokens in the last ${LATENCY_SPAN} s.`,
        },
        (v) => [v.kvUsage, v.hitRate],
      ],
      [{ ...latency, title: "Request latency" }, (v) => v.endToEnd],
    ];
    this.#plots = plots.map(([options, pick]) => ({ plot: new Plot(options), pick }));
    for (const [name, label] of Object.entries(TILES)) {
      const [value, note] = [element("p", { class: "tile-value" }, "–"), element("p", { class: "quiet small" })];
      this.#tiles[name] = {
        value,
        note,
        node: element(
          "div",
          { class: "card tile", "data-tile": name, hidden: name === "acceptance" },
          element("h2", {}, label),
          value,
          note,
        ),
      };
    }
    this.#root.append(
      element("div", { class: "dashboard-head" }, element("h1", {}, "Dashboard"), this.#spanChoice()),
      this.#problem,
      element(
        "div",
        { class: "tiles" },
        Object.values(this.#tiles).map(({ node }) => node),
      ),
      element(
        "div",
        { class: "plots" },
        this.#plots.map(({ plot }) => plot.node),
      ),
      this.#models.node,
      element("section", { class: "card" }, element("h2", {}, "Since server start"), this.#totals),
    );
  }

  #spanChoice() {
    const buttons = Object.entries(SPANS).map(([label, span]) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": String(span === this.#span),
          click: (event) => {
            this.#span = span;
            for (const button of buttons) button.setAttribute("aria-pressed", String(button === event.currentTarget));
            this.#show();
          },
        },
        label,
      ),
    );
    return element("div", { class: "segments", role: "group", "aria-label": "Time shown" }, buttons);
  }

  #showProblem(error) {
    const text = element("p", {}, `${error.message} Retrying every second.`);
    const enter = async () => {
      if (await askForKey(currentKey())) this.#poll();
    };
    const button =
      error.status === 401
        ? element("button", { type: "button", class: "button small", click: enter }, "Enter key")
        : null;
    // Announce a problem once, not every second.
    if (this.#problem.hidden || this.#problem.dataset.status !== String(error.status)) {
      this.#problem.replaceChildren(icon("alert"), text, ...(button === null ? [] : [button]));
    }
    this.#problem.dataset.status = String(error.status);
    this.#problem.hidden = false;
  }

  #show() {
    const last = this.#readings.at(-1);
    if (last === undefined) return;
    const now = performance.now() / 1000;
    for (const { plot, pick } of this.#plots) {
      const points = this.#readings.map(({ time, values }) => ({ time, values: pick(values) }));
      plot.update(points, this.#span, now);
    }
    this.#showTiles(last);
    this.#showTotals(last.reading);
    this.#models.update(last.reading);
  }

  #showTiles({ reading, values }) {
    const total = reading.sum(M.queries);
    const info = reading.all(M.cache)[0]?.labels ?? {};
    const room = Number(info.block_size) * Number(info.num_gpu_blocks);
    const set = (name, value, note = "") => {
      this.#tiles[name].value.textContent = value;
      this.#tiles[name].note.textContent = note;
    };
    set("running", number(values.running), `${short(reading.sum(M.finished) || 0)} finished`);
    set("waiting", number(values.waiting), `${seconds(reading.mean(M.queue))} on average`);
    set("output", short(values.output), `${short(reading.sum(M.output))} in total`);
    set("prompt", short(values.prompt), `${short(reading.sum(M.prompt))} in total`);
    set("kvUsage", percent(values.kvUsage), Number.isFinite(room) ? `of ${short(room)} tokens` : "");
    const overall = total > 0 ? reading.sum(M.hits) / total : NaN;
    set(
      "hitRate",
      percent(Number.isFinite(values.hitRate) ? values.hitRate : overall),
      `${percent(overall)} since start`,
    );
    const drafts = reading.sum(M.drafts);
    this.#tiles.acceptance.node.hidden = !(drafts > 0); // without speculation there are none
    if (drafts > 0) {
      const accepted = reading.sum(M.accepted);
      const recent = Number.isFinite(values.acceptance) ? values.acceptance : accepted / drafts;
      const share = percent(accepted / reading.sum(M.output));
      set("acceptance", percent(recent), `${share} of all tokens since start`);
    }
  }

  #showTotals(reading) {
    const finished = reading.all(M.finished).filter(({ value }) => value > 0);
    const rows = [
      ["Requests finished", number(finished.reduce((total, { value }) => total + value, 0))],
      ...finished.map(({ labels, value }) => [`by ${labels.finished_reason ?? "other"}`, number(value)]),
      ["Tokens generated", number(reading.sum(M.output))],
      ["Prompt tokens", number(reading.sum(M.prompt))],
      ...(reading.sum(M.drafts) > 0
        ? [
            ["Drafts verified", number(reading.sum(M.drafts))],
            ["Drafts accepted", number(reading.sum(M.accepted))],
          ]
        : []),
      ["Mean time to first token", seconds(reading.mean(M.firstToken))],
      ["Mean time between tokens", seconds(reading.mean(M.interToken))],
      ["Mean time waiting", seconds(reading.mean(M.queue))],
      ["Preemptions", number(reading.sum(M.preemptions))],
      ["Engine restarts", number(reading.sum(M.restarts) || 0)],
    ];
    this.#totals.replaceChildren(
      ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
  }
}
