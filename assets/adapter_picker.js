// Uploaded adapters, each with a strength slider. The value is the rows, as Python makes them.
const $ = (part) => element.querySelector(part);
const root = $(".adapter-list"), list = $(".rows");
// On a tab that is just opening, some properties are not there yet.
const known = (name, otherwise) => props[name] ?? otherwise;
const rows = () => known("value", []);
const make = (tag, className, content = "") => Object.assign(
  document.createElement(tag), { className, textContent: content });

const row = (adapter, i) => {
  const item = make("li", "row"), label = make("label", ""), slider = make("input", "");
  const remove = make("button", "plain-button remove", text.remove), value = make("span", "value");
  Object.assign(slider, { type: "range", min: 0, max: text.max, step: text.step });
  slider.setAttribute("aria-label", `${text.strength}: ${adapter.name}`);
  slider.addEventListener("input", (event) => {
    event.stopPropagation();
    props.value = rows().map((one, j) => (j === i ? { ...one, strength: Number(slider.value) } : one));
    updateSlider(item, rows()[i]);
  });
  slider.addEventListener("change", (event) => event.stopPropagation());
  remove.type = "button";
  remove.setAttribute("aria-label", `${text.remove}: ${adapter.name}`);
  remove.addEventListener("click", () => {
    props.value = rows().filter((_, j) => j !== i);
    props.state = "ready";
    props.message = `${text.removed} ${adapter.name}`;
    props.notes = [];
    paint();
    const next = list.children[Math.min(i, rows().length - 1)];
    (next?.querySelector(".remove") ?? element.closest(".adapters")?.querySelector("button"))?.focus();
  });
  value.ariaHidden = "true";
  label.append(make("span", "", text.strength), value, slider);
  item.append(make("p", "name", adapter.name), remove, make("p", "facts", adapter.message), label);
  return item;
};
const updateSlider = (item, adapter) => {
  const slider = item.querySelector("input"), shown = Number(adapter.strength).toFixed(2);
  if (Number(slider.value) !== adapter.strength) slider.value = adapter.strength;
  slider.style.setProperty("--range_progress", `${(adapter.strength / text.max) * 100}%`);
  slider.setAttribute("aria-valuetext", shown);
  item.querySelector(".value").textContent = shown;
};

$(".help").textContent = text.help;
// Rows are redrawn only when the adapters change: a slider that is being dragged must stay.
let drawn = "";
const paint = () => {
  const files = JSON.stringify(rows().map((adapter) => [adapter.file, adapter.name, adapter.message]));
  if (files !== drawn) list.replaceChildren(...rows().map(row));
  drawn = files;
  rows().forEach((adapter, i) => updateSlider(list.children[i], adapter));
  root.dataset.state = known("state", "empty");
  if ($(".message").textContent !== known("message", "")) $(".message").textContent = known("message", "");
  $(".notes").replaceChildren(...known("notes", []).map((note) => make("li", "", note)));
};
watch(["value", "state", "message", "notes"], () => requestAnimationFrame(paint));
paint();
