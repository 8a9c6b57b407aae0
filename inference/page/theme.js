// Light or dark before anything is painted; loaded ahead of the page, so that a dark page does not flash white.
"use strict";
{
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    let chosen = null;
    try {
      chosen = localStorage.getItem("theme");
    } catch {
      // a browser that keeps nothing
    }
    document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  apply();
}
