// The API reference, rendered from /openapi.json, which the server generates from its route table.

import { address, getJson } from "./api.js";
import { byId, copyButton, element, icon, offerFile } from "./dom.js";
import { setUpHeader } from "./header.js";
import { Schemas } from "./schema.js";
import { tryIt } from "./try-it.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const SAMPLES = {
  messages: [{ role: "user", content: "Hello!" }],
  prompt: "The sky is",
  input: "A text",
  query: "What is the capital of France?",
  documents: ["Paris is in France.", "Berlin is in Germany."],
  tokens: [1, 2, 3],
  text_1: "A text",
  text_2: "Another text",
};
/** Example values by field name. */
const BOUNDS = ["max_completion_tokens", "max_output_tokens", "max_tokens"];
const MAX_TOKENS = 64;

setUpHeader();
load();

async function load() {
  const place = byId("operations");
  place.replaceChildren(element("p", { class: "quiet" }, "Loading"));
  try {
    const document_ = await getJson("openapi.json");
    const models = await getJson("v1/models", { quiet: true }).catch(() => null);
    show(document_, models?.data?.[0]?.id ?? "model");
  } catch (error) {
    const again = element("button", { type: "button", class: "button small", click: load }, "Try again");
    const box = element(
      "div",
      { class: "error-box", role: "alert" },
      icon("alert"),
      element("p", {}, error.message),
      again,
    );
    place.replaceChildren(box);
  }
}

function show(document_, model) {
  SAMPLES.model = model;
  const schemas = new Schemas(document_);
  const operations = [];
  for (const [path, methods] of Object.entries(document_.paths ?? {})) {
    for (const method of METHODS) {
      if (methods[method] !== undefined) operations.push({ path, method, ...methods[method] });
    }
  }
  const { title = "API", version = "" } = document_.info ?? {};
  // A plain link would not send the API key.
  const save = () => offerFile("openapi.json", [JSON.stringify(document_, null, 2)]);
  const link = element("button", { type: "button", class: "link-button nowrap", click: save }, "openapi.json");
  byId("operations").replaceChildren(
    element("h1", {}, `${title} API`, element("span", { class: "version" }, version)),
    element(
      "p",
      { class: "quiet" },
      "The endpoints of this server, which works with clients for OpenAI's API. Raw document: ",
      link,
      ".",
    ),
    ...operations.map((operation) => section(operation, schemas)),
  );
  byId("contents").replaceChildren(element("ul", {}, operations.map(contentsItem)));
  if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

function idOf({ method, path }) {
  return `${method}${path.replace(/[^A-Za-z0-9]+/g, "-")}`.replace(/-+$/, "");
}

function contentsItem(operation) {
  return element(
    "li",
    {},
    element("a", { href: `#${idOf(operation)}` }, methodTag(operation.method), element("span", {}, operation.path)),
  );
}

function methodTag(method) {
  return element("span", { class: `method ${method}` }, method.toUpperCase());
}

function section(operation, schemas) {
  const { path, method, summary, description, parameters = [], requestBody, responses = {}, security } = operation;
  const needsKey = (security ?? []).length > 0;
  const content = Object.values(requestBody?.content ?? {})[0];
  const body = content?.schema;
  const sample = body === undefined ? null : (content.example ?? exampleBody(body, schemas));
  return element(
    "section",
    { class: "operation", id: idOf(operation), "aria-labelledby": `${idOf(operation)}-title` },
    element("h2", { id: `${idOf(operation)}-title` }, methodTag(method), " ", element("code", {}, path)),
    element("p", { class: "summary" }, summary ?? "", needsKey ? keyTag() : null),
    description && description !== summary ? element("p", { class: "quiet" }, description) : null,
    part("Example", example(operation, sample, needsKey)),
    tryIt(operation, parameters, sample),
    parameters.length > 0 ? part("Parameters", parameterList(parameters, schemas)) : null,
    body === undefined ? null : part("Body", schemas.fields(body), schemas.resolve(body).description),
    part("Answers", answers(responses, schemas)),
  );
}

function keyTag() {
  return element("span", { class: "tag" }, icon("key"), "needs a key");
}

function part(title, content, note = null) {
  return [element("h3", {}, title), note ? element("p", { class: "quiet small" }, note) : null, content];
}

function parameterList(parameters, schemas) {
  const properties = Object.fromEntries(
    parameters.map(({ name, schema, description, in: where }) => [
      name,
      { ...schema, description: [`In the ${where}.`, description].filter(Boolean).join(" ") },
    ]),
  );
  const required = parameters.filter((parameter) => parameter.required).map(({ name }) => name);
  return schemas.fields({ properties, required });
}

function example({ path, method }, body, needsKey) {
  const lines = [`curl ${quoted(decodeURI(address(path.slice(1))))}`];
  if (method !== "get") lines[0] += ` -X ${method.toUpperCase()}`;
  if (needsKey) lines.push('-H "Authorization: Bearer $OCTAVO_API_KEY"');
  if (body !== null) {
    lines[0] = lines[0].replace(" -X POST", "");
    lines.push('-H "Content-Type: application/json"', `-d ${quoted(JSON.stringify(body))}`);
  }
  const text = lines.join(" \\\n  ");
  return element(
    "div",
    { class: "code-block" },
    element(
      "div",
      { class: "code-head" },
      element("span", {}, "curl"),
      copyButton("Copy command", () => text),
    ),
    element("pre", { tabindex: "0" }, element("code", {}, text)),
  );
}

/** An example body: the required fields, or else the first field with an example value; answers are limited. */
function exampleBody(body, schemas) {
  const names = Object.keys(schemas.resolve(body).properties ?? {});
  let value = schemas.example(body, SAMPLES) ?? {};
  if (Object.keys(value).length === 0) {
    const name = names.find((field) => field !== "model" && field in SAMPLES);
    value = name === undefined ? {} : { [name]: SAMPLES[name] };
  }
  const bound = BOUNDS.find((field) => names.includes(field));
  return bound === undefined ? value : { ...value, [bound]: MAX_TOKENS };
}

/** Quotes a text as one word of a shell command. */
function quoted(text) {
  return /^[\w:/.@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function answers(responses, schemas) {
  const rows = Object.entries(responses).map(([status, { description, content = {} }]) => {
    const bodies = Object.entries(content).map(([type, { schema = {}, ...more }]) => {
      const shown = more["x-event-schema"] ?? schema;
      const hasFields = Object.keys(schemas.resolve(shown).properties ?? {}).length > 0;
      const name =
        type === "text/event-stream"
          ? `${type}, events of ${schemas.typeText(shown)}`
          : `${type}, ${schemas.typeText(shown)}`;
      if (!hasFields) return element("p", { class: "quiet small" }, name);
      const details = element("details", { class: "answer-body" }, element("summary", {}, name));
      details.addEventListener("toggle", () => details.append(schemas.fields(shown)), { once: true });
      return details;
    });
    const kind = status.startsWith("2") ? "good" : "bad";
    return element(
      "div",
      { class: "answer" },
      element("span", { class: `status ${kind}` }, status),
      element("div", {}, element("p", {}, description ?? ""), bodies),
    );
  });
  return element("div", { class: "answers" }, rows);
}
