// Browser storage under names of our own. Several servers may share an origin behind a proxy, so keys carry the path;
// storage may be full or forbidden, so nothing here throws but `write`.

const PREFIX = `octavo:${new URL(".", document.baseURI).pathname}:`;

export function read(name, area = localStorage_()) {
  try {
    return area?.getItem(PREFIX + name) ?? null;
  } catch {
    return null;
  }
}

/** @throws {DOMException} There is no room. */
export function write(name, value, area = localStorage_()) {
  area?.setItem(PREFIX + name, value);
}

export function remove(name, area = localStorage_()) {
  try {
    area?.removeItem(PREFIX + name);
  } catch {
    // then it is not there either
  }
}

/** Names of all entries that begin with a text. */
export function names(start) {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (key?.startsWith(PREFIX + start)) found.push(key.slice(PREFIX.length));
    }
  } catch {
    return [];
  }
  return found;
}

/** A JSON value, or null if there is none that makes sense. */
export function readJson(name) {
  const text = read(name);
  if (text === null) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Keeps a JSON value if there is room; for what may be lost. */
export function writeJson(name, value) {
  try {
    write(name, JSON.stringify(value));
  } catch {
    // a preference that is not kept
  }
}

/** The name that a storage event of another tab is about, or null. */
export function nameOf(event) {
  return event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
}

/** The storage of this tab, or undefined where it is forbidden. */
export function sessionArea() {
  try {
    return sessionStorage;
  } catch {
    return undefined;
  }
}

function localStorage_() {
  try {
    return localStorage;
  } catch {
    return undefined;
  }
}
