// Shows attachments: thumbnails and names in a row, and a dialog that shows one of them whole.

import { element, icon, iconButton } from "./dom.js";
import { count, short } from "./format.js";

/**
 * A row of attachments.
 *
 * @param {object[]} attachments
 * @param {FileStore} files
 * @param {?(attachment: object) => void} onRemove If given, each has a button to remove it.
 * @returns {?HTMLElement} Null without attachments.
 */
export function attachmentList(attachments, files, onRemove = null) {
  if (attachments.length === 0) return null;
  const items = attachments.map((attachment) =>
    element(
      "li",
      { class: `attachment is-${attachment.kind}` },
      attachment.kind === "image" ? thumbnail(attachment, files) : textChip(attachment),
      onRemove === null
        ? null
        : iconButton("close", `Remove ${attachment.name}`, () => onRemove(attachment), {
            class: "icon-button tiny attachment-remove",
          }),
    ),
  );
  return element("ul", { class: "attachments", "aria-label": "Attachments" }, items);
}

function thumbnail(attachment, files) {
  const { name, width, height } = attachment;
  const show = () => openDialog(name, picture(attachment, files, {}));
  return element(
    "button",
    { type: "button", class: "thumbnail", title: `${name}, ${width} × ${height} pixels`, click: show },
    picture(attachment, files, { width: 96, height: 96 }),
  );
}

/** An image of a stored file. What stands for it while it is read has its size. */
function picture({ name, file, width, height }, files, size) {
  const image = element("img", { alt: name, width: size.width ?? width, height: size.height ?? height });
  files.get(file).then((blob) => {
    if (blob === null) {
      image.replaceWith(element("span", { class: "missing quiet small" }, `${name} is missing`));
      return;
    }
    const address = URL.createObjectURL(blob);
    for (const end of ["load", "error"]) image.addEventListener(end, () => URL.revokeObjectURL(address));
    image.src = address;
  });
  return image;
}

function textChip({ name, text }) {
  const show = () => openDialog(name, element("pre", { tabindex: "0" }, element("code", {}, text)));
  const lines = text.split("\n").length - (text.endsWith("\n") ? 1 : 0);
  return element(
    "button",
    { type: "button", class: "text-chip", title: name, click: show },
    icon("file"),
    element("span", { class: "text-chip-name" }, name),
    element(
      "span",
      { class: "quiet small nowrap" },
      lines > 1 ? `${short(lines)} lines` : count(text.length, "letter"),
    ),
  );
}

function openDialog(title, body) {
  const close = iconButton("close", "Close", () => dialog.close());
  const head = element("div", { class: "viewer-head" }, element("h2", { id: "viewer-title" }, title), close);
  const dialog = element("dialog", { class: "dialog viewer", "aria-labelledby": "viewer-title" }, head, body);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the dialog
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
