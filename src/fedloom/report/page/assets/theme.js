// Before the first paint: the theme that was chosen the last time.
try {
  const held = localStorage.getItem("fedloom-theme");
  if (held === "light" || held === "dark") document.documentElement.dataset.theme = held;
} catch { /* a page from a file may have no storage */ }
