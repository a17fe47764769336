// Parses server-sent events from a fetch response, since EventSource can neither post a body nor send a key.

/**
 * The data of each event.
 *
 * @param {ReadableStream<Uint8Array>} body Body of the response.
 * @yields {string} Data lines of an event, joined by line breaks.
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A carriage return at the end may be half of a CRLF, so it is held back until more data arrives.
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    // A consumer that stops early does not need the rest of the response.
    reader.cancel().catch(() => {});
  }
}
