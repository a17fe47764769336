// A classic script that runs before the first paint: with a module the page would flash in the wrong colours.
// The dark colours are a style sheet of their own (dark.css); its media attribute decides whether they apply.
(() => {
  const KEY = "octavo:theme";
  const sheet = document.getElementById("dark-theme");
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      const value = localStorage.getItem(KEY);
      return value === "dark" || value === "light" ? value : null;
    } catch {
      return null; // storage may be switched off
    }
  }

  function apply() {
    const choice = stored();
    sheet.media = choice === null ? "(prefers-color-scheme: dark)" : choice === "dark" ? "all" : "not all";
    const isDark = choice === null ? system.matches : choice === "dark";
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    document.dispatchEvent(new CustomEvent("themechange"));
  }

  /** Switches between light and dark. A choice equal to the system's is no choice: the page follows it again. */
  function toggle() {
    const wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      if (wanted === (system.matches ? "dark" : "light")) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch {
      sheet.media = wanted === "dark" ? "all" : "not all"; // for as long as the page lives
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
