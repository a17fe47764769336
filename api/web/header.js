// The common header of the pages: icons, and the switch between light and dark.

import { byId, drawIcons, setIcon, setLabel } from "./dom.js";

export function setUpHeader() {
  drawIcons();
  const button = byId("theme-toggle");
  const show = () => {
    const isDark = document.documentElement.dataset.theme === "dark";
    setIcon(button, isDark ? "sun" : "moon");
    setLabel(button, isDark ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => {
    globalThis.octavoTheme.toggle();
    show();
  });
  document.addEventListener("themechange", show);
  show();
}
