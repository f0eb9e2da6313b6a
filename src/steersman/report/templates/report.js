"use strict";
(() => {
  const root = document.documentElement;
  document.querySelectorAll(".js").forEach((element) => { element.hidden = false; });

  // Light and dark: the system's choice until the reader makes one.
  const toggle = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const show = () => {
    toggle.textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
    toggle.setAttribute("aria-pressed", String(isDark()));
  };
  try { // Storage may be forbidden to local files.
    const kept = localStorage.getItem("steersman-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* then nothing is kept */ }
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("steersman-theme", root.dataset.theme); } catch { /* as above */ }
    show();
  });
  dark.addEventListener("change", show);
  show();

  // Copy buttons.
  const copy = async (text) => {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed: the old way */ }
    const area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    area.style.opacity = "0";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  document.querySelectorAll(".copy").forEach((button) => {
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", async () => {
      const done = await copy(button.parentElement.querySelector("code").textContent);
      button.focus();
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      if (!done) getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  });

  // Tabs: without scripts, all panels stand below each other under their headings.
  document.querySelectorAll(".tabs").forEach((group, number) => {
    const panels = [...group.children];
    if (panels.length < 2) return;
    const list = document.createElement("div");
    list.className = "tablist";
    list.setAttribute("role", "tablist");
    const select = (index) => {
      panels.forEach((panel, i) => {
        const tab = list.children[i];
        panel.hidden = i !== index;
        tab.setAttribute("aria-selected", String(i === index));
        tab.tabIndex = i === index ? 0 : -1;
      });
    };
    panels.forEach((panel, i) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = `t${number}-${i}`;
      panel.id = `t${number}-${i}-panel`;
      tab.textContent = panel.dataset.title;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", () => select(i));
      list.append(tab);
    });
    list.addEventListener("keydown", (event) => {
      const at = [...list.children].indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: panels.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const index = (to + panels.length) % panels.length;
      select(index);
      list.children[index].focus();
    });
    group.classList.add("tabbed");
    group.prepend(list);
    select(0);
  });

  // On paper, everything is open.
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((element) => { element.open = true; });
  });
})();
