// The lines of the lyrics: the one that is sung is marked while the player plays; a click seeks to it.
const $ = (part) => element.querySelector(part);
const root = $(".lyric-lines"), list = $("ol");
const known = (name, otherwise) => props[name] ?? otherwise;
let lines = [], buttons = [], now = -1, stop = () => {};

const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;

// The last line that has begun, until it has ended.
const lineAt = (seconds) => {
  const i = lines.findLastIndex(({ start_s, end_s }) => start_s <= seconds && end_s > start_s);
  return i >= 0 && seconds < lines[i].end_s ? i : -1;
};
const mark = (i) => {
  if (i === now) return;
  buttons[now]?.removeAttribute("aria-current");
  now = i;
  const button = buttons[i];
  if (!button) return;
  button.setAttribute("aria-current", "true");
  const above = button.offsetTop - list.offsetTop, height = list.clientHeight;
  if (above < list.scrollTop || above + button.offsetHeight > list.scrollTop + height) {
    list.scrollTop = above - height / 3;
  }
};

// The player tells nobody where it is but by the width of what is played, which it keeps in a
// shadow tree, and which is renewed with every song.
const follow = () => {
  stop();
  const home = element.closest(".result"), wave = `#${player} #waveform > div`;
  if (!home || !lines.length) return;
  let bar = null;
  const read = () => mark(lineAt((parseFloat(bar.style.width) / 100) * known("seconds", 0)));
  const moved = new MutationObserver(read);
  const attach = () => {
    const found = home.querySelector(wave)?.shadowRoot?.querySelector("[part=progress]");
    if (!found || found === bar) return;
    moved.disconnect();
    bar = found;
    moved.observe(bar, { attributes: true, attributeFilter: ["style"] });
  };
  const renewed = new MutationObserver(attach);
  renewed.observe(home, { childList: true, subtree: true });
  attach();
  stop = () => { moved.disconnect(); renewed.disconnect(); };
};

const seek = (i) => {
  props.value = { seconds: lines[i].start_s + 0.001, number: (known("value", null)?.number ?? 0) + 1 };
  trigger("seek");
  mark(i);
};
const focus = (i) => {
  const to = Math.max(0, Math.min(buttons.length - 1, i));
  buttons.forEach((button, j) => { button.tabIndex = j === to ? 0 : -1; });
  buttons[to].focus();
};

const paint = () => {
  lines = known("lines", []);
  now = -1;
  root.dataset.state = lines.length ? "ready" : "empty";
  $("h3").textContent = text.title;
  $(".help").textContent = text.help;
  list.setAttribute("aria-label", text.title);
  buttons = lines.map((line, i) => {
    const button = document.createElement("button"), time = document.createElement("time");
    const words = document.createElement("span");
    button.type = "button";
    button.tabIndex = i ? -1 : 0;
    time.textContent = clock(line.start_s);
    words.textContent = line.text;
    button.append(time, words);
    if (!line.sung) {
      const unsure = document.createElement("small");
      unsure.textContent = text.unsung;
      button.append(unsure);
    }
    button.addEventListener("click", () => { focus(i); seek(i); });
    return button;
  });
  list.replaceChildren(...buttons.map((button) => {
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  list.scrollTop = 0;
  follow();
};

list.addEventListener("keydown", (event) => {
  const i = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (i < 0 || to === undefined) return;
  event.preventDefault();
  focus(to);
});
watch(["lines", "seconds"], paint);
paint();
