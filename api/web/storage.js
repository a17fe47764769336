// Browser storage with prefixed keys. Several servers may share an origin behind a proxy, so keys include the path.
// Storage may be full or disabled, so only `write` throws.

export const PREFIX = `octavo:${new URL(".", document.baseURI).pathname}:`;

export function read(name, area = localStorage_()) {
  try {
    return area?.getItem(PREFIX + name) ?? null;
  } catch {
    return null;
  }
}

/** @throws {DOMException} The storage is full. */
export function write(name, value, area = localStorage_()) {
  area?.setItem(PREFIX + name, value);
}

export function remove(name, area = localStorage_()) {
  try {
    area?.removeItem(PREFIX + name);
  } catch {
    // storage is disabled, so there is no entry
  }
}

/** Names of all entries with a prefix. */
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

/** A stored JSON value, or null if it is missing or invalid. */
export function readJson(name) {
  const text = read(name);
  if (text === null) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Saves a JSON value that may be lost if the storage is full. */
export function writeJson(name, value) {
  try {
    write(name, JSON.stringify(value));
  } catch {
    // the value is not saved
  }
}

/** The entry name in a storage event from another tab, or null. */
export function nameOf(event) {
  return event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
}

/** The session storage of this tab, or undefined if it is disabled. */
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
