// Shows JSON schemas as expandable trees, and generates example values for them.

import { element } from "./dom.js";

const MAX_DEPTH = 6;
const MAX_INT32 = 2 ** 31 - 1;

/** Resolves references and describes schemas. */
export class Schemas {
  #components;

  /** @param {object} document The OpenAPI document. */
  constructor(document) {
    this.#components = document.components?.schemas ?? {};
  }

  /** The schema, or the target if it is a reference. */
  resolve(schema) {
    const name = referenceName(schema);
    return name === null ? (schema ?? {}) : (this.#components[name] ?? {});
  }

  /** The rows of an object's fields. Nested objects are rendered when they are expanded. */
  fields(schema, depth = 0) {
    const { properties = {}, required = [] } = this.resolve(schema);
    const isRequired = ([name]) => required.includes(name);
    const all = Object.entries(properties);
    const sorted = [...all.filter(isRequired), ...all.filter((entry) => !isRequired(entry))];
    const rows = sorted.map(([name, field]) => this.#field(name, field, required.includes(name), depth));
    return element("div", { class: "fields" }, rows);
  }

  #field(name, schema, isRequired, depth) {
    const notes = [schema.description, ...limits(schema)].filter(Boolean);
    const head = [
      element("code", { class: "field-name" }, name),
      element("span", { class: "field-type" }, this.typeText(isRequired ? schema : withoutNull(schema))),
      isRequired ? element("span", { class: "tag" }, "required") : null,
    ];
    const text = notes.length === 0 ? null : element("p", { class: "quiet small" }, notes.join(" "));
    const inner = depth < MAX_DEPTH ? this.#objectWithin(schema) : null;
    if (inner === null) return element("div", { class: "field" }, element("div", { class: "field-head" }, head), text);
    const details = element("details", { class: "field" }, element("summary", { class: "field-head" }, head), text);
    details.addEventListener("toggle", () => details.append(this.fields(inner, depth + 1)), { once: true });
    return details;
  }

  /** The object schema in a field, directly, in a list or as one of several alternatives; null if there is none. */
  #objectWithin(schema) {
    for (const part of [schema, ...(schema.anyOf ?? []), schema.items ?? null]) {
      if (part === null) continue;
      const found = this.resolve(part);
      if (Object.keys(found.properties ?? {}).length > 0) return found;
      if (part !== schema && (part.items || part.anyOf)) {
        const inner = this.#objectWithin(part);
        if (inner !== null) return inner;
      }
    }
    return null;
  }

  /** A type as text: string, list of integer, ChatMessage. */
  typeText(schema) {
    const name = referenceName(schema);
    if (name !== null) return name;
    if (schema.enum !== undefined) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    const parts = schema.anyOf ?? schema.oneOf;
    if (parts !== undefined) return [...new Set(parts.map((part) => this.typeText(part)))].join(" | ");
    if (schema.type === "array") return `list of ${this.typeText(schema.items ?? {})}`;
    if (schema.type === "object" && schema.additionalProperties) {
      return `object of ${this.typeText(schema.additionalProperties)}`;
    }
    return Array.isArray(schema.type) ? schema.type.join(" | ") : (schema.type ?? "any");
  }

  /** An example value of a schema, with required fields only; `samples` has example values by field name. */
  example(schema, samples, depth = 0) {
    const found = this.resolve(schema);
    if (found.default !== undefined && found.default !== null) return found.default;
    if (found.enum !== undefined) return found.enum.find((value) => value !== null) ?? null;
    const parts = found.anyOf ?? found.oneOf;
    if (parts !== undefined) return this.example(parts[0], samples, depth);
    if (depth > MAX_DEPTH) return null;
    switch (found.type) {
      case "object": {
        const names = found.required ?? [];
        const value = (name) => samples[name] ?? this.example(found.properties?.[name] ?? {}, samples, depth + 1);
        return Object.fromEntries(names.map((name) => [name, value(name)]));
      }
      case "array":
        return [this.example(found.items ?? {}, samples, depth + 1)];
      case "integer":
      case "number":
        return found.minimum ?? 1;
      case "boolean":
        return true;
      case "null":
        return null;
      default:
        return "text";
    }
  }
}

/** Removes the null alternative: all optional fields of this API may be null, so it is not shown. */
function withoutNull(schema) {
  const parts = schema.anyOf?.filter((part) => part.type !== "null") ?? [];
  return parts.length === 0 ? schema : { ...schema, anyOf: parts };
}

function referenceName(schema) {
  return typeof schema?.$ref === "string" ? schema.$ref.split("/").at(-1) : null;
}

/** The limits of a schema's values as text. For a field that may be null, they are in one of its alternatives. */
function limits(schema) {
  const notes = [];
  for (const part of [schema, ...(schema.anyOf ?? [])]) {
    const { minimum, exclusiveMinimum, minLength, maxLength, minItems, pattern } = part;
    const maximum = part.maximum >= MAX_INT32 ? undefined : part.maximum; // not a meaningful limit
    if (minimum !== undefined && maximum !== undefined) notes.push(`${minimum} to ${maximum}.`);
    else if (minimum !== undefined) notes.push(`At least ${minimum}.`);
    else if (maximum !== undefined) notes.push(`At most ${maximum}.`);
    if (exclusiveMinimum !== undefined) notes.push(`More than ${exclusiveMinimum}.`);
    if (minLength !== undefined && minLength === maxLength) notes.push(`${minLength} characters.`);
    else if (maxLength !== undefined) notes.push(`At most ${maxLength} characters.`);
    if (minItems !== undefined) notes.push(`At least ${minItems} items.`);
    if (pattern !== undefined) notes.push(`Pattern: ${pattern}`);
  }
  if (schema.default !== undefined && schema.default !== null)
    notes.push(`Default: ${JSON.stringify(schema.default)}.`);
  return notes;
}
