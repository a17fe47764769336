// What the page keeps, in the form on which its code relies. Stored conversations may come from older versions, and
// imported ones from anywhere.
//
// A conversation: {id, title, created, updated, model, settings, child, messages}; see branches.js for the order of
// messages. A message: {id, parent, child, role, content}, with `attachments` (see attachments.js) from users,
// `toolCallId` from tools, and for an answer {reasoning, toolCalls, status, error, finishReason, stats, model,
// isEdited}. Status is streaming, done, stopped or error.

import { repairAttachments } from "./attachments.js";
import { link } from "./branches.js";

const ROLES = new Set(["user", "assistant", "tool"]);
const STATUSES = new Set(["done", "stopped", "error"]);
const MAX_TITLE = 200;
const STATS = ["promptTokens", "cachedTokens", "tokens", "firstToken", "rate"];

/** A conversation with all fields that the page relies on and no others, or null if the value is not one. */
export function repair(value, id) {
  if (!isObject(value) || !Array.isArray(value.messages)) return null;
  const conversation = {
    id,
    title: textOr(value.title, "").slice(0, MAX_TITLE),
    created: numberOr(value.created, 0),
    updated: numberOr(value.updated, 0),
    model: textOr(value.model, ""),
    settings: isObject(value.settings) ? { ...value.settings } : {},
    child: numberOr(value.child, null),
    messages: value.messages.map(repairMessage).filter((message) => message !== null),
  };
  link(conversation);
  return conversation;
}

/** A saved prompt {id, title, text}, or null if the value is not one. */
export function repairPrompt(value) {
  if (!isObject(value) || typeof value.text !== "string" || value.text.trim() === "") return null;
  return { id: textOr(value.id, ""), title: textOr(value.title, "").slice(0, MAX_TITLE), text: value.text };
}

function repairMessage(value) {
  if (!isObject(value) || !ROLES.has(value.role)) return null;
  const { role, id, parent } = value;
  const message = { id, parent, child: value.child ?? null, role, content: textOr(value.content, "") };
  if (role === "tool") return { ...message, toolCallId: textOr(value.toolCallId, "") };
  if (role === "user") {
    const attachments = repairAttachments(value.attachments);
    return attachments.length > 0 ? { ...message, attachments } : message;
  }
  return {
    ...message,
    reasoning: textOr(value.reasoning, ""),
    toolCalls: Array.isArray(value.toolCalls) ? value.toolCalls.filter(isToolCall) : [],
    // An answer that was running when the page was closed ends where it was last saved.
    status: STATUSES.has(value.status) ? value.status : "stopped",
    error: textOr(value.error, ""),
    finishReason: textOr(value.finishReason, null),
    stats: repairStats(value.stats),
    model: textOr(value.model, ""),
    isEdited: value.isEdited === true,
  };
}

function repairStats(value) {
  if (!isObject(value) || !Number.isFinite(value.tokens)) return null;
  return Object.fromEntries(STATS.map((name) => [name, numberOr(value[name], null)]));
}

function isToolCall(call) {
  return isObject(call) && ["id", "name", "arguments"].every((name) => typeof call[name] === "string");
}

function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function textOr(value, otherwise) {
  return typeof value === "string" ? value : otherwise;
}

function numberOr(value, otherwise) {
  return Number.isFinite(value) ? value : otherwise;
}
