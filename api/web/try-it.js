// "Try it": a form for each endpoint of the API reference, which sends a request and shows the response as it arrives.

import { address } from "./api.js";
import { element } from "./dom.js";
import { seconds } from "./format.js";
import { askForKey, authorization, currentKey } from "./keys.js";

const MAX_SHOWN = 100_000;
/** Maximum number of characters of a response to show. */

/**
 * The form of an endpoint.
 *
 * @param {{path: string, method: string}} operation
 * @param {object[]} parameters Its path parameters, as OpenAPI lists them.
 * @param {?object} body The initial body; null: the endpoint takes none.
 */
export function tryIt({ path, method }, parameters, body) {
  const fields = parameters.map((parameter) => parameterField(parameter));
  const area = body === null ? null : bodyArea(path, method, body);
  const send = element("button", { type: "submit", class: "button small primary" }, "Send");
  const stop = element("button", { type: "button", class: "button small", hidden: true }, "Stop");
  const status = element("p", { class: "try-status small", role: "status" });
  const output = element("pre", { class: "try-output", tabindex: "0", hidden: true });
  let running = null;
  const run = async () => {
    if (area !== null && !isJson(area)) return;
    running = new AbortController();
    [send.disabled, stop.hidden, output.hidden] = [true, false, false];
    output.textContent = "";
    status.textContent = "Waiting";
    await exchange(filled(path, fields), method, area?.value, running.signal, status, output);
    [send.disabled, stop.hidden] = [false, true];
  };
  stop.addEventListener("click", () => running.abort());
  const submit = (event) => {
    event.preventDefault();
    run();
  };
  return element(
    "details",
    { class: "try-it" },
    element("summary", {}, "Try it"),
    element(
      "form",
      { submit },
      fields.map(({ label }) => label),
      area === null ? null : element("label", {}, "Body", area),
      element("div", { class: "try-buttons" }, send, stop, status),
    ),
    output,
  );
}

function parameterField({ name }) {
  const input = element("input", { type: "text", name, required: true, autocomplete: "off", spellcheck: "false" });
  return { name, input, label: element("label", {}, name, input) };
}

function bodyArea(path, method, body) {
  const text = JSON.stringify(body, null, 2);
  const area = element("textarea", {
    class: "code-input",
    rows: Math.min(16, text.split("\n").length + 1),
    spellcheck: "false",
    autocomplete: "off",
    "aria-label": `Body of ${method.toUpperCase()} ${path}`,
    input: () => area.setCustomValidity(""),
  });
  area.value = text;
  return area;
}

function isJson(area) {
  try {
    JSON.parse(area.value);
    return true;
  } catch (error) {
    area.setCustomValidity(`This is not valid JSON: ${error.message}`);
    area.reportValidity();
    return false;
  }
}

function filled(path, fields) {
  let result = path.slice(1);
  // A model name may contain slashes, which the server accepts unescaped.
  const encoded = (text) => text.split("/").map(encodeURIComponent).join("/");
  for (const { name, input } of fields) result = result.replace(`{${name}}`, () => encoded(input.value));
  return result;
}

/** Sends a request, and again if a key was requested, and shows the response. */
async function exchange(path, method, body, signal, status, output) {
  try {
    for (;;) {
      const key = currentKey();
      const begin = performance.now();
      const response = await fetch(address(path), {
        method: method.toUpperCase(),
        headers: {
          ...(key === null ? {} : { Authorization: authorization(key) }),
          ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        },
        body,
        signal,
        cache: "no-store",
        credentials: "same-origin",
      });
      if (response.status === 401 && (await askForKey(key))) continue;
      await show(response, begin, status, output);
      return;
    }
  } catch (error) {
    status.textContent = error.name === "AbortError" ? "Stopped." : `Cannot reach the server: ${error.message}`;
  }
}

async function show(response, begin, status, output) {
  const type = response.headers.get("content-type") ?? "";
  const tell = (isDone) => {
    const spent = seconds((performance.now() - begin) / 1000);
    status.textContent = `${response.status} ${response.statusText}, ${spent}${isDone ? "" : " so far"}`;
  };
  tell(false);
  const text = element("code");
  output.replaceChildren(text);
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let shown = "";
  for (let part = await reader?.read(); part !== undefined && !part.done; part = await reader.read()) {
    if (shown.length < MAX_SHOWN) shown += part.value;
    text.textContent = shown.slice(0, MAX_SHOWN);
    tell(false);
  }
  if (type.startsWith("application/json") && shown.length < MAX_SHOWN) text.textContent = pretty(shown);
  else if (shown.length >= MAX_SHOWN) text.append("\n… truncated");
  if (shown === "") text.textContent = "(no body)";
  tell(true);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
