// The list of models in a modal dialog, which keeps the focus and closes on Escape by itself.
const $ = (part) => element.querySelector(part);
const dialog = $("dialog"), list = $(".rows"), message = $(".message");
const make = (tag, className, content = "") => Object.assign(
  document.createElement(tag), { className, textContent: content });
$("#models-title").textContent = text.title;
$(".close").textContent = text.close;
$(".help").textContent = text.help;
$(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Rows are kept and changed, so that the focus stays where it is.
const items = new Map();
const draw = (row) => {
  const item = make("li", "row"), bar = make("progress", ""), button = make("button", "plain-button");
  button.type = "button";
  bar.max = 1;
  bar.setAttribute("aria-label", `${text.progress} ${row.title}`);
  button.addEventListener("click", () => ask(`${button.dataset.action} ${row.name}`));
  item.append(make("p", "name", row.title), make("p", "facts"), button, bar, make("p", "state"));
  return item;
};
const update = (item, row) => {
  const button = item.querySelector("button"), bar = item.querySelector("progress");
  item.querySelector(".facts").textContent = row.facts;
  item.querySelector(".state").textContent = row.message;
  button.hidden = !row.button;
  button.disabled = !row.enabled;
  button.textContent = row.label;
  button.dataset.action = row.button;
  button.setAttribute("aria-label", `${row.label}: ${row.title}`);
  bar.hidden = row.share === null;
  if (row.share !== null) bar.value = row.share;
};
const paint = (rows) => {
  for (const row of rows) {
    if (!items.has(row.name)) {
      let group = list.querySelector(`[data-kind="${row.kind}"]`);
      if (!group) {
        const section = make("section", "");
        group = Object.assign(make("ul", ""), { ariaLabel: text.kinds[row.kind] });
        group.dataset.kind = row.kind;
        section.append(make("h3", "", text.kinds[row.kind]), group);
        list.append(section);
      }
      items.set(row.name, draw(row));
      group.append(items.get(row.name));
    }
    update(items.get(row.name), row);
  }
};
let timer = null;
const ask = async (asked) => {
  clearTimeout(timer);
  try {
    const answer = await server.manage(asked);
    paint(answer.rows);
    if (asked || answer.problem) message.textContent = answer.problem;
  } catch { /* the server is gone: the page itself says so */ }
  clearTimeout(timer);
  if (dialog.open) timer = setTimeout(() => ask(""), 1000);
};
document.addEventListener("click", (event) => {
  if (!event.target.closest("#masthead .badge")) return;
  dialog.showModal();
  ask("");
});
dialog.addEventListener("close", () => {
  clearTimeout(timer);
  document.querySelector("#masthead .badge")?.focus();
});
