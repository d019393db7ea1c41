// Adapters that were brought, each with its strength. The value is the rows, as Python made them.
const $ = (part) => element.querySelector(part);
const root = $(".rack"), list = $(".rows");
// On a tab that opens just now some properties are not there yet.
const known = (name, otherwise) => props[name] ?? otherwise;
const rows = () => known("value", []);
const make = (tag, className, text = "") => Object.assign(
  document.createElement(tag), { className, textContent: text });

const row = (worn, i) => {
  const item = make("li", "row"), label = make("label", ""), slider = make("input", "");
  const drop = make("button", "press drop", say.remove), at = make("span", "at");
  Object.assign(slider, { type: "range", min: 0, max: say.most, step: say.step });
  slider.setAttribute("aria-label", `${say.strength}: ${worn.name}`);
  slider.addEventListener("input", (event) => {
    event.stopPropagation();
    props.value = rows().map((one, j) => (j === i ? { ...one, strength: Number(slider.value) } : one));
    slide(item, rows()[i]);
  });
  slider.addEventListener("change", (event) => event.stopPropagation());
  drop.type = "button";
  drop.setAttribute("aria-label", `${say.remove}: ${worn.name}`);
  drop.addEventListener("click", () => {
    props.value = rows().filter((_, j) => j !== i);
    props.state = "ready";
    props.told = `${say.removed} ${worn.name}`;
    props.notes = [];
    paint();
    const next = list.children[Math.min(i, rows().length - 1)];
    (next?.querySelector(".drop") ?? element.closest(".adapters")?.querySelector("button"))?.focus();
  });
  at.ariaHidden = "true";
  label.append(make("span", "", say.strength), at, slider);
  item.append(make("p", "name", worn.name), drop, make("p", "facts", worn.told), label);
  return item;
};
const slide = (item, worn) => {
  const slider = item.querySelector("input"), shown = Number(worn.strength).toFixed(2);
  if (Number(slider.value) !== worn.strength) slider.value = worn.strength;
  slider.style.setProperty("--range_progress", `${(worn.strength / say.most) * 100}%`);
  slider.setAttribute("aria-valuetext", shown);
  item.querySelector(".at").textContent = shown;
};

$(".tip").textContent = say.tip;
// Rows stay while their adapters do: a slider that is being dragged must not be made anew.
let drawn = "";
const paint = () => {
  const files = JSON.stringify(rows().map((worn) => [worn.file, worn.name, worn.told]));
  if (files !== drawn) list.replaceChildren(...rows().map(row));
  drawn = files;
  rows().forEach((worn, i) => slide(list.children[i], worn));
  root.dataset.state = known("state", "empty");
  if ($(".told").textContent !== known("told", "")) $(".told").textContent = known("told", "");
  $(".notes").replaceChildren(...known("notes", []).map((note) => make("li", "", note)));
};
watch(["value", "state", "told", "notes"], () => requestAnimationFrame(paint));
paint();
