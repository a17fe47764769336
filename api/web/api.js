// Requests to the server. URLs are relative to the page, so that it works under any path prefix of a proxy.

import { askForKey, authorization, currentKey } from "./keys.js";

/** A failed request, with a message for the user. */
export class ApiError extends Error {
  /**
   * @param {string} message What to show.
   * @param {object} details `status`: HTTP status, 0 if there was no response; `param`: the field at fault.
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
  }
}

const TEXTS = {
  401: "The server requires an API key.",
  404: "The server does not have this endpoint.",
  413: "The request is too large for the server.",
  503: "The server is busy or shutting down.",
};

export function address(path) {
  return new URL(path, document.baseURI).href;
}

/**
 * Sends a request; on 401, asks for a key and retries.
 *
 * @param {string} path Relative to the page.
 * @param {object} options `json`: body to post; `signal`; `quiet`: do not ask for a key; `onSend`: called per attempt.
 * @returns {Promise<Response>} A successful response.
 * @throws {ApiError} The server cannot be reached, or returns an error.
 * @throws {DOMException} AbortError, if the signal is aborted.
 */
export async function request(path, { json, signal, quiet = false, onSend } = {}) {
  for (;;) {
    const key = currentKey();
    onSend?.();
    const response = await send(path, json, signal, key);
    if (response.ok) return response;
    if (response.status !== 401 || quiet || !(await askForKey(key))) throw await errorOf(response);
  }
}

async function send(path, json, signal, key) {
  const headers = {};
  if (key !== null) headers.Authorization = authorization(key);
  if (json !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(address(path), {
      method: json === undefined ? "GET" : "POST",
      headers,
      body: json === undefined ? undefined : JSON.stringify(json),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("Cannot reach the server.");
  }
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  return new ApiError(messageOf(text, response), { status: response.status, param: paramOf(text) });
}

function messageOf(text, response) {
  const info = errorInfo(text);
  if (typeof info?.message === "string" && info.message !== "") return sentence(info.message);
  const status = `${response.status} ${response.statusText}`.trim();
  return TEXTS[response.status] ?? `The server returned ${status}.`;
}

function paramOf(text) {
  const param = errorInfo(text)?.param;
  return typeof param === "string" ? param : null;
}

function errorInfo(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    return undefined; // for example, an error page of a proxy
  }
}

/** Turns an error message of the server, which begins in lower case as in a log, into a sentence. */
function sentence(message) {
  const text = /^[a-z]+ /.test(message) ? message[0].toUpperCase() + message.slice(1) : message;
  return /[.!?:]$/.test(text) ? text : `${text}.`;
}

/** The error in an event of a stream, if any. */
export function streamError(data) {
  if (data?.error === undefined || data.error === null) return null;
  const message = typeof data.error.message === "string" ? sentence(data.error.message) : "The answer was cut off.";
  return new ApiError(message, { status: Number(data.error.code) || 0 });
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}
