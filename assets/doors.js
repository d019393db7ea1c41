// A file of the studio's brought by its button or dropped anywhere, and the link the page came by.
const $ = (part) => element.querySelector(part);
const root = $(".doors"), press = $(".press"), chooser = $("input");
const known = (name, otherwise) => props[name] ?? otherwise;

const paint = (state = known("state", "empty"), told = known("told", "")) => {
  root.dataset.state = state;
  press.textContent = say.open;
  chooser.setAttribute("aria-label", say.open);
  if ($(".told").textContent !== told) $(".told").textContent = told;
  $(".notes").replaceChildren(...known("notes", []).map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
};

let number = 0;
const send = (what) => {
  props.value = { ...what, number: ++number };
  trigger("come");
};
const bring = async (file) => {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  scrollTo({ top: 0, behavior: still ? "auto" : "smooth" });  // what is said stands there
  props.notes = [];
  paint("reading", say.reading.replace("{name}", file.name));
  try {
    const { path, url } = await upload(file);
    send({ file: { path, url, orig_name: file.name, meta: { _type: "gradio.FileData" } } });
  } catch {
    paint("refused", say.not_uploaded.replace("{name}", file.name));
  }
};

press.addEventListener("click", () => chooser.click());
chooser.addEventListener("change", (event) => {
  event.stopPropagation();
  if (chooser.files[0]) bring(chooser.files[0]);
  chooser.value = "";
});

// Fields that take a file of their own keep what is dropped on them.
const files = (event) => event.dataTransfer?.types.includes("Files")
  && !event.target.closest?.(".file, .brought, input[type=file]");
document.addEventListener("dragover", (event) => {
  if (!files(event)) return;
  event.preventDefault();
  root.dataset.over = "";
});
for (const over of ["dragleave", "drop", "dragend"]) {
  document.addEventListener(over, () => { delete root.dataset.over; });
}
document.addEventListener("drop", (event) => {
  if (!files(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files[0]) bring(event.dataTransfer.files[0]);
});

watch(["state", "told", "notes"], () => paint());
paint();
const link = location.search + location.hash;
if (link.includes("=")) setTimeout(() => send({ link }), 0);
