// Building elements. Text only ever goes in as text: nothing here, or anywhere else on the page, parses HTML.

import { ICONS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Makes an element.
 *
 * @param {string} tag Name of the element.
 * @param {object} attributes Attributes; functions become listeners of the event that the key names, `class` takes a
 *   string, true and false switch an attribute on and off, null and undefined leave it out.
 * @param {...(Node|string|null|undefined|Array)} children Nodes and texts.
 */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Makes an SVG element. */
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

/** A drawing of icons.js; decoration for those who see, so screen readers pass over it. */
export function icon(name) {
  return draw(svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }), name);
}

/** Shows another drawing. */
export function setIcon(holder, name) {
  draw(holder.querySelector(".icon"), name);
}

/** Draws the icons that the page itself has, each named by its attribute `data-icon`. */
export function drawIcons() {
  for (const place of document.querySelectorAll("svg[data-icon]")) draw(place, place.dataset.icon);
}

function draw(place, name) {
  place.replaceChildren(...ICONS[name].map(([tag, attributes]) => svg(tag, attributes)));
  return place;
}

/** A button that shows an icon and has its name as a tooltip and for screen readers. */
export function iconButton(name, label, onClick, attributes = {}) {
  const button = element("button", { type: "button", class: "icon-button", ...attributes, click: onClick }, icon(name));
  setLabel(button, label);
  return button;
}

/** Names a button that shows no text. */
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
 * Copies a text. Pages that come over plain HTTP from another machine have no clipboard interface, so there is a way
 * around it.
 *
 * @returns {Promise<boolean>} Whether it worked.
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

/** A button that copies what `text()` returns and says so for a moment. */
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

/** Lets the browser save a JSON text as a file. */
export function offerFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
