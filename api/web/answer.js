// An answer being generated: sends the request and fills a message from the stream.

import { ApiError, request, streamError } from "./api.js";
import { contentOf } from "./attachments.js";
import { before } from "./branches.js";
import { bodyFields } from "./settings.js";
import { events } from "./sse.js";

/** Creates the message for a new answer. */
export function newAnswer(model) {
  return {
    role: "assistant",
    content: "",
    reasoning: "",
    toolCalls: [],
    status: "streaming",
    error: "",
    finishReason: null,
    stats: null,
    model,
  };
}

/** Fills a message with an answer. Calls `onChange` whenever it has grown, and `onEnd` once. */
export class Answer {
  #abort = new AbortController();
  #onChange;
  #numTokens = 0;
  #begin = 0;
  #first = 0;
  #last = 0;
  #usage = null;
  #earlier;
  /** Statistics of the part of the answer that is continued. */

  constructor(message, onChange) {
    this.message = message;
    this.#onChange = onChange;
    this.#earlier = message.stats;
  }

  /** Aborts the answer immediately; the text so far is kept. */
  stop() {
    this.#abort.abort();
    this.message.status = "stopped";
    this.#noteStats();
  }

  /** Tokens per second so far, or NaN. */
  get rate() {
    return (this.#numTokens - 1) / ((this.#last - this.#first) / 1000);
  }

  /**
   * Requests and receives the answer. Never throws: errors are recorded in the message.
   *
   * @param {object} conversation Whose settings and messages before this one are sent. A message with content is sent
   *   too, to be continued.
   * @param {FileStore} files
   */
  async run(conversation, files) {
    const { message } = this;
    try {
      const response = await request("v1/chat/completions", {
        json: await requestBody(conversation, message, files),
        signal: this.#abort.signal,
        // Called again after the user has entered a key, so that this time is not measured as the server's.
        onSend: () => {
          this.#begin = performance.now();
        },
      });
      for await (const data of events(response.body)) {
        if (this.#abort.signal.aborted) return; // data that was already received is not shown
        if (data === "[DONE]") break;
        this.#take(JSON.parse(data));
      }
      if (message.finishReason === null) throw new ApiError("The connection closed before the answer was complete.");
      message.status = "done";
    } catch (error) {
      this.#fail(error);
    }
    this.#noteStats();
  }

  #fail(error) {
    if (this.#abort.signal.aborted) return;
    const { message } = this;
    message.status = "error";
    message.error = error instanceof ApiError ? error.message : describe(error);
  }

  #take(chunk) {
    const error = streamError(chunk);
    if (error !== null) throw error;
    if (chunk.usage) this.#usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice === undefined) return;
    const { delta = {} } = choice;
    this.#countToken(delta);
    const { message } = this;
    message.content += delta.content ?? "";
    message.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) addToolCall(message.toolCalls, call);
    if (choice.finish_reason) message.finishReason = choice.finish_reason;
    this.#onChange();
  }

  /** Each event is one token, even without text (a partial character), except the event with the role. */
  #countToken(delta) {
    const isToken = [delta.content, delta.reasoning, delta.reasoning_content, delta.tool_calls].some(
      (part) => part !== undefined && part !== null,
    );
    if (!isToken || (delta.role !== undefined && !delta.content && !delta.reasoning)) return;
    this.#last = performance.now();
    if (this.#numTokens === 0) this.#first = this.#last;
    this.#numTokens++;
  }

  #noteStats() {
    if (this.#numTokens === 0) return;
    const usage = this.#usage;
    const numTokens = usage?.completion_tokens ?? this.#numTokens;
    const spell = (this.#last - this.#first) / 1000;
    this.message.stats = {
      promptTokens: usage?.prompt_tokens ?? null,
      cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
      tokens: numTokens + (this.#earlier?.tokens ?? 0),
      firstToken: this.#earlier?.firstToken ?? (this.#first - this.#begin) / 1000,
      rate: spell > 0 && numTokens > 1 ? (numTokens - 1) / spell : null,
    };
  }
}

/** Adds a piece of a tool call; the index tells which call it belongs to. */
function addToolCall(calls, piece) {
  const index = Number.isInteger(piece.index) ? Math.min(piece.index, 127) : calls.length;
  while (calls.length <= index) calls.push({ id: "", name: "", arguments: "" });
  const call = calls[index];
  if (piece.id) call.id = piece.id;
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}

/** Prepares an answer to be continued. */
export function reopen(message) {
  // Models begin a word with its space, and many templates remove one at the end.
  const content = message.content.trimEnd();
  Object.assign(message, { content, status: "streaming", error: "", finishReason: null });
}

async function requestBody(conversation, answer, files) {
  const { settings } = conversation;
  const messages = [];
  if (settings.system?.trim()) messages.push({ role: "system", content: settings.system });
  for (const message of before(conversation, answer)) {
    const sent = await asSent(message, files);
    if (sent !== null) messages.push(sent);
  }
  const isContinued = answer.content !== "";
  if (isContinued) messages.push(asContinued(answer));
  return {
    model: conversation.model || undefined,
    ...bodyFields(settings),
    messages,
    ...(isContinued ? { continue_final_message: true, add_generation_prompt: false } : {}),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** The answer that is continued: what was thought belongs to it. */
function asContinued({ content, reasoning }) {
  return { role: "assistant", content, ...(reasoning === "" ? {} : { reasoning }) };
}

/** A message in the format of the API, or null for an empty answer. Reasoning is not sent back. */
async function asSent(message, files) {
  if (message.role === "user") return { role: "user", content: await contentOf(message, files) };
  if (message.role === "tool") return { role: "tool", tool_call_id: message.toolCallId, content: message.content };
  const { content, toolCalls } = message;
  if (content === "" && toolCalls.length === 0) return null;
  if (toolCalls.length === 0) return { role: "assistant", content };
  const calls = toolCalls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role: "assistant", content: content === "" ? null : content, tool_calls: calls };
}

function describe(error) {
  if (error instanceof SyntaxError) return "The server sent an invalid answer.";
  if (error instanceof TypeError) return "The connection to the server was lost.";
  return `The answer was cut off: ${error.message}`;
}
