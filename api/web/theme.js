// A classic script that runs before the first paint: with a module, the page would flash in the wrong colours.
// The dark colours are in a separate style sheet (dark.css), which its media attribute enables.
(() => {
  const KEY = "octavo:theme";
  const sheet = document.getElementById("dark-theme");
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      const value = localStorage.getItem(KEY);
      return value === "dark" || value === "light" ? value : null;
    } catch {
      return null; // storage may be disabled
    }
  }

  function apply() {
    const choice = stored();
    sheet.media = choice === null ? "(prefers-color-scheme: dark)" : choice === "dark" ? "all" : "not all";
    const isDark = choice === null ? system.matches : choice === "dark";
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    document.dispatchEvent(new CustomEvent("themechange"));
  }

  /** Switches between light and dark. If the new theme is the system's, the page follows the system again. */
  function toggle() {
    const wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      if (wanted === (system.matches ? "dark" : "light")) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch {
      sheet.media = wanted === "dark" ? "all" : "not all"; // not saved: applies until the page is closed
      document.documentElement.dataset.theme = wanted;
      return;
    }
    apply();
  }

  apply();
  system.addEventListener("change", apply);
  addEventListener("storage", (event) => {
    if (event.key === KEY) apply();
  });
  globalThis.octavoTheme = { toggle };
})();
