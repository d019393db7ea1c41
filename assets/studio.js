() => {
  const root = document.documentElement;
  root.lang = "en";
  root.classList.add("dark");
  document.body.classList.add("dark");

  const panelOf = (node) => node.closest("[role=tabpanel]") ?? document;
  const visible = (node) => node && node.getClientRects().length > 0;

  // Ctrl or Cmd with Enter in a text box presses the tab's main button.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (!event.target.matches("textarea, input")) return;
    const run = panelOf(event.target).querySelector(".actions button.primary");
    if (!visible(run) || run.disabled) return;
    event.preventDefault();
    event.stopPropagation();
    run.click();
  }, true);

  // Add names and roles that Gradio leaves out.
  const addNames = () => {
    for (const announcement of document.querySelectorAll(".announcement:not([aria-live])")) {
      announcement.setAttribute("role", "status");
      announcement.setAttribute("aria-live", "polite");
      announcement.setAttribute("aria-atomic", "true");
    }
    // Gradio's label contains the help text; the accessible name is the label alone.
    for (const box of document.querySelectorAll("label.container textarea:not([aria-label])")) {
      const label = box.closest("label");
      const help = label.querySelector(".info-text")?.textContent.trim();
      box.setAttribute("aria-label", label.querySelector("span")?.textContent.trim() ?? "");
      if (help) box.setAttribute("aria-description", help);
    }
    for (const box of document.querySelectorAll(".digits :is(input, textarea):not([inputmode])")) {
      box.inputMode = "decimal";
    }
    // Gradio 6.31 gives each radio button a group of its own, which disables the arrow keys.
    for (const field of document.querySelectorAll("fieldset[id]")) {
      for (const radio of field.querySelectorAll("input[type=radio]")) {
        if (radio.name !== field.id) radio.name = field.id;
      }
      if (!field.hasAttribute("aria-label")) {
        field.setAttribute("aria-label", field.querySelector("span")?.textContent.trim() ?? "");
      }
    }
    // Gradio disables a group of choices or nothing.
    for (const field of document.querySelectorAll("fieldset[id$=-instrumental]")) {
      const vocals = field.querySelector("input[type=radio]");
      const disabled = field.matches(".no-vocals");
      if (vocals && vocals.disabled !== disabled) vocals.disabled = disabled;
    }
    // File fields, and the buttons that clear them, need distinct names.
    for (const button of document.querySelectorAll(".file .upload-container, .file .icon-button")) {
      const label = button.closest(".file").querySelector("label")?.textContent.trim();
      const does = button.matches(".icon-button") ? "remove the file" : "choose a file, or drop it here";
      if (button.ariaLabel !== `${label}: ${does}`) button.ariaLabel = `${label}: ${does}`;
    }
    for (const header of document.querySelectorAll(".toast-header[role]")) {
      header.removeAttribute("role");
      header.removeAttribute("tabindex");
    }
    for (const empty of document.querySelectorAll(".empty[aria-label]:not([role])")) {
      empty.setAttribute("role", "img");
    }
    for (const status of document.querySelectorAll(".status[data-state=done]:not([data-seen])")) {
      status.dataset.seen = "";
      const panel = panelOf(status);
      if (panel === startedIn) setTimeout(() => reveal(panel.querySelector(".result")), 100);
      startedIn = null;
    }
  };

  // Scroll to a new result if it is out of view, but never while somebody is typing.
  let startedIn = null;
  document.addEventListener("click", (event) => {
    if (event.target.closest(".actions .primary, [id$=-again]")) startedIn = panelOf(event.target);
  }, true);
  const reveal = (result) => {
    if (!visible(result) || document.activeElement?.matches("textarea, input")) return;
    const { top } = result.getBoundingClientRect();
    if (top > 150 && top < innerHeight * 0.6) return;  // the job controls cover what is higher
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    result.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  };
  new MutationObserver(addNames).observe(document.body, { childList: true, subtree: true });
  addNames();

  // Tabs: arrow keys, one stop for the Tab key, ?tab= in the address, the last tab after a reload.
  const wait = setInterval(() => {
    const list = document.querySelector("#studio [role=tablist]");
    if (!list) return;
    clearInterval(wait);
    const tabs = () => [...list.querySelectorAll("[role=tab]")];
    const narrow = matchMedia("(max-width: 640px)");
    const settle = () => {
      const chosen = list.querySelector("[aria-selected=true]");
      if (sent && chosen !== sent) {
        sent = null;
        chosen.focus();
        scrollTo(0, 0);
      }
      if (chosen) list.scrollTo({ left: chosen.offsetLeft - list.offsetLeft - 48 });
      list.setAttribute("aria-label", document.title);
      list.setAttribute("aria-orientation", narrow.matches ? "horizontal" : "vertical");
      if (chosen) studioSession.storeTab(chosen.dataset.tabId);
      for (const tab of tabs()) {
        tab.tabIndex = tab.getAttribute("aria-selected") === "true" ? 0 : -1;
        tab.title = tab.textContent.trim();
      }
    };
    // The button that sends a take to another tab disappears with its tab: move the focus.
    let sent = null;
    document.addEventListener("click", (event) => {
      sent = event.target.closest("button.send, #lyrics-use") && list.querySelector("[aria-selected=true]");
    }, true);
    list.addEventListener("keydown", (event) => {
      const all = tabs();
      const here = all.indexOf(document.activeElement);
      const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      const to = event.key === "Home" ? 0
        : event.key === "End" ? all.length - 1
        : by ? (here + by + all.length) % all.length : -1;
      if (to < 0) return;
      event.preventDefault();
      all[to].click();
      all[to].focus();
    });
    new MutationObserver(settle).observe(list, {
      subtree: true, attributes: true, attributeFilter: ["aria-selected"],
    });
    narrow.addEventListener("change", settle);
    settle();
    const kept = studioSession.resumed ? studioSession.kept.tab : null;
    const wanted = kept ?? new URLSearchParams(location.search).get("tab");
    if (wanted) tabs().find((tab) => tab.dataset.tabId === wanted)?.click();
  }, 50);
}
