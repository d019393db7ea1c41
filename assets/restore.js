// Load settings from a song file (chosen or dropped anywhere), the link, and the browser's storage.
const $ = (part) => element.querySelector(part);
const root = $(".restore"), button = $(".plain-button"), chooser = $("input");
const known = (name, otherwise) => props[name] ?? otherwise;

const paint = (state = known("state", "empty"), message = known("message", "")) => {
  root.dataset.state = state;
  button.textContent = text.open;
  chooser.setAttribute("aria-label", text.open);
  if ($(".message").textContent !== message) $(".message").textContent = message;
  $(".notes").replaceChildren(...known("notes", []).map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
};

let number = 0;
const send = (value, event = "come") => {
  props.value = { ...value, number: ++number };  // a value that is equal would not be sent
  trigger(event);
};
const sendFile = async (file) => {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  scrollTo({ top: 0, behavior: still ? "auto" : "smooth" });  // where the message is
  props.notes = [];
  paint("reading", text.reading.replace("{name}", file.name));
  try {
    const { path, url } = await upload(file);
    send({ file: { path, url, orig_name: file.name, meta: { _type: "gradio.FileData" } } });
  } catch {
    paint("refused", text.not_uploaded.replace("{name}", file.name));
  }
};

button.addEventListener("click", () => chooser.click());
chooser.addEventListener("change", (event) => {
  event.stopPropagation();
  if (chooser.files[0]) sendFile(chooser.files[0]);
  chooser.value = "";
});

// Fields for files keep what is dropped on them.
const files = (event) => event.dataTransfer?.types.includes("Files")
  && !event.target.closest?.(".file, .upload, input[type=file]");
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
  if (event.dataTransfer.files[0]) sendFile(event.dataTransfer.files[0]);
});

watch(["state", "message", "notes"], () => paint());
// The answer to "resume": from now on, changes of the forms are kept.
watch("token", () => { if (props.token) studioSession.start(props.token); });
paint();
// A link fills in its form once, not again at every reload.
const address = location.search + location.hash;
const link = address.includes("=") && !studioSession.resumed ? { link: address } : {};
setTimeout(() => send({ session: studioSession.kept, ...link }, "resume"), 0);
