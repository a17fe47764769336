// What users attach to messages: images, and texts of any kind.
//
// An attachment: {kind: "image", name, type, size, width, height, file}, with the id of a file in a FileStore, or
// {kind: "text", name, text}.

const IMAGE_TYPES = new Set(["image/png", "image/jpeg", "image/webp"]);
/** Those that servers can decode; the browser converts other images that it can show. */
const HEAD = 65_536;
/** Bytes among which an animation is announced. */
const MAX_SIDE = 2560;
/** Pixels. Larger images are scaled down: no model sees more, and requests hold all images of the conversation. */
const MAX_BYTES = 4_000_000;
/** Images of more bytes are encoded again. */
const MAX_FILE = 50_000_000;
const MAX_TEXT = 2_000_000;
export const MAX_ATTACHMENTS = 20;
const MAX_NAME = 200;

/** A file that cannot be attached, with a message for the user. */
export class AttachmentError extends Error {}

/**
 * Reads a file.
 *
 * @param {File} file
 * @param {boolean} takesImages Whether the model takes images.
 * @returns {Promise<{attachment: object, blob: ?Blob}>} An image's attachment has no `file` yet; `blob` is its content.
 * @throws {AttachmentError} It is neither a text nor an image, or too large.
 */
export async function readFile(file, takesImages) {
  const name = file.name.slice(0, MAX_NAME) || "file";
  if (file.size > MAX_FILE) throw new AttachmentError(`${name} is too large: at most ${MAX_FILE / 1e6} MB.`);
  // An SVG is an image to those who can see it, and a text to all others.
  if (file.type.startsWith("image/") && (takesImages || file.type !== "image/svg+xml")) {
    if (!takesImages) throw new AttachmentError(`${name} is an image, which this model does not take.`);
    return { ...(await readImage(file, name)) };
  }
  return { attachment: { kind: "text", name, text: await readText(file, name) }, blob: null };
}

async function readText(file, name) {
  if (file.size > MAX_TEXT) throw new AttachmentError(`${name} is too long: at most ${MAX_TEXT / 1e6} MB of text.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text;
  } catch {
    // not UTF-8
  }
  throw new AttachmentError(`${name} is neither an image nor a text.`);
}

async function readImage(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new AttachmentError(`${name} cannot be read as an image.`);
  }
  try {
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    const isSmall = scale === 1 && file.size <= MAX_BYTES;
    const isGood = isSmall && IMAGE_TYPES.has(file.type) && !(await isAnimated(file));
    const blob = isGood ? file : await encode(bitmap, width, height, file.type);
    if (blob === null) throw new AttachmentError(`${name} cannot be converted.`);
    const attachment = { kind: "image", name, type: blob.type, size: blob.size, width, height };
    return { attachment, blob: new Blob([blob], { type: blob.type }) };
  } finally {
    bitmap.close();
  }
}

/** Whether it is an animated PNG or WebP. Models see one frame, and servers do not choose it. */
async function isAnimated(file) {
  const head = new TextDecoder("latin1").decode(await file.slice(0, HEAD).arrayBuffer());
  return head.includes(file.type === "image/webp" ? "ANIM" : "acTL");
}

/** Photos become JPEG; drawings stay without losses unless they are too large for that. */
async function encode(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const to = (format) => new Promise((resolve) => canvas.toBlob(resolve, format, 0.9));
  if (type === "image/jpeg") return to("image/jpeg");
  const exact = await to("image/png");
  return exact !== null && exact.size <= MAX_BYTES ? exact : to("image/jpeg");
}

/**
 * The content of a user's message as the API takes it: a text, or parts if there are images.
 *
 * @param {object} message
 * @param {FileStore} files
 */
export async function contentOf(message, files) {
  const attachments = message.attachments ?? [];
  const texts = attachments.filter(({ kind }) => kind === "text").map(quoted);
  const images = attachments.filter(({ kind }) => kind === "image");
  const parts = [];
  for (const { name, file } of images) {
    const blob = await files.get(file);
    if (blob === null) texts.push(`(The image ${name} is missing.)`);
    else parts.push({ type: "image_url", image_url: { url: await dataUrl(blob) } });
  }
  const text = [...texts, message.content].filter((piece) => piece !== "").join("\n\n");
  if (parts.length === 0) return text;
  return text === "" ? parts : [...parts, { type: "text", text }];
}

/** A text file, fenced with more backticks than it has in a row. */
function quoted({ name, text }) {
  const longest = (text.match(/`+/g) ?? []).reduce((most, run) => Math.max(most, Math.min(run.length, 1000)), 2);
  const fence = "`".repeat(longest + 1);
  const suffix = /\.(\w{1,12})$/.exec(name)?.[1] ?? "";
  return `${name}:\n\n${fence}${suffix}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** The content of a file as a data URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

/** The image in a data URL, or null if it is not one of a known type. */
export function imageIn(url) {
  const match = /^data:(image\/[a-z]+);base64,/.exec(url.slice(0, 40));
  if (match === null || !IMAGE_TYPES.has(match[1])) return null;
  try {
    const bytes = Uint8Array.from(atob(url.slice(match[0].length)), (char) => char.charCodeAt(0));
    return new Blob([bytes], { type: match[1] });
  } catch {
    return null; // not base64
  }
}

/** The valid ones of stored attachments. */
export function repairAttachments(values) {
  if (!Array.isArray(values)) return [];
  return values
    .slice(0, MAX_ATTACHMENTS)
    .map(repairAttachment)
    .filter((attachment) => attachment !== null);
}

function repairAttachment(value) {
  if (typeof value?.name !== "string") return null;
  const name = value.name.slice(0, MAX_NAME);
  if (value.kind === "text" && typeof value.text === "string") return { kind: "text", name, text: value.text };
  if (value.kind !== "image" || typeof value.file !== "string" || !IMAGE_TYPES.has(value.type)) return null;
  const sizes = ["size", "width", "height"].map((field) => [field, Number.isFinite(value[field]) ? value[field] : 0]);
  return { kind: "image", name, type: value.type, ...Object.fromEntries(sizes), file: value.file };
}
