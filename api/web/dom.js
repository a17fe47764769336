// Helpers to build elements. Text is always inserted as text nodes: no code of the page parses HTML.

import { ICONS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Creates an element.
 *
 * @param {string} tag Tag name.
 * @param {object} attributes Attributes. A function becomes a listener of the event named by its key; `class` takes a
 *   string; true and false set and omit a boolean attribute; null and undefined omit an attribute.
 * @param {...(Node|string|null|undefined|Array)} children Nodes and texts.
 */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Creates an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children) {
    if (Array.isArray(child)) append(node, child);
    else if (child !== null && child !== undefined) node.append(child);
  }
}

/** Creates an icon of icons.js. It is decoration, hidden from screen readers. */
export function icon(name) {
  return draw(svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }), name);
}

/** Replaces the icon in an element. */
export function setIcon(holder, name) {
  draw(holder.querySelector(".icon"), name);
}

/** Draws the icons in the page's HTML, which are named by `data-icon` attributes. */
export function drawIcons() {
  for (const place of document.querySelectorAll("svg[data-icon]")) draw(place, place.dataset.icon);
}

function draw(place, name) {
  place.replaceChildren(...ICONS[name].map(([tag, attributes]) => svg(tag, attributes)));
  return place;
}

/** A button with an icon, labelled by a tooltip and for screen readers. */
export function iconButton(name, label, onClick, attributes = {}) {
  const button = element("button", { type: "button", class: "icon-button", ...attributes, click: onClick }, icon(name));
  setLabel(button, label);
  return button;
}

/** Labels a button without text. */
export function setLabel(button, label) {
  button.setAttribute("aria-label", label);
  button.title = label;
}

/** The element with an id, which must exist. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`there is no element #${id}`);
  return found;
}

/**
 * Copies a text to the clipboard. Browsers disable the clipboard API for pages from other machines over plain HTTP, so
 * there is a fallback.
 *
 * @returns {Promise<boolean>} Whether it succeeded.
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true", readonly: true });
    area.value = text;
    (before?.closest("dialog") ?? document.body).append(area);
    area.select();
    let worked = false;
    try {
      worked = document.execCommand("copy");
    } catch {
      worked = false;
    }
    area.remove();
    before?.focus?.({ preventScroll: true });
    return worked;
  }
}

const DONE_MS = 1600;

/** A button that copies the result of `text()` and briefly confirms it. */
export function copyButton(label, text, attributes = {}) {
  let timer = 0;
  const button = iconButton(
    "copy",
    label,
    async () => {
      const worked = await copyText(text());
      setIcon(button, worked ? "check" : "alert");
      setLabel(button, worked ? "Copied" : "Could not copy");
      clearTimeout(timer);
      timer = setTimeout(() => {
        setIcon(button, "copy");
        setLabel(button, label);
      }, DONE_MS);
    },
    attributes,
  );
  return button;
}

/** Offers JSON, in pieces of text, as a file download. */
export function offerFile(name, pieces) {
  const address = URL.createObjectURL(new Blob(pieces, { type: "application/json" }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
