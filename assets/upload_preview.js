// The preview of an uploaded file: waveform, playback, and the selected region.
const $ = (part) => element.querySelector(part);
const root = $(".upload-preview"), canvas = $("canvas"), sound = $("audio"), play = $(".play");
const ends = [$(".from"), $(".to")];
const SHORTEST_S = 0.1;
// On a tab that is just opening, some properties are not there yet.
const known = (name) => props[name] ?? empty[name];
const ready = () => known("state") === "ready" && known("seconds") > 0;
const hasRegion = () => known("has_region") && !props.whole && ready() && Array.isArray(props.value);
const region = () => (hasRegion() ? props.value : [0, known("seconds")]);
const clamp = (low, value, high) => Math.min(high, Math.max(low, value));
const toTenth = (value) => Math.round(value * 10) / 10;
const clock = (value) => `${value.toFixed(1)} s`;

// Draw everything from the properties, whenever they change and after every move.
const paint = () => {
  root.dataset.state = known("state");
  root.dataset.region = hasRegion();
  const message = $(".message");
  if (message.textContent !== known("message")) message.textContent = known("message");
  $(".help").textContent = hasRegion() ? text.help : "";
  $(".notes").replaceChildren(...known("notes").map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  canvas.setAttribute("aria-label", `${text.waveform} ${known("name")}`);
  play.textContent = sound.paused ? (hasRegion() ? text.play_region : text.play) : text.stop;
  if (ready()) drawWaveform();
  if (hasRegion()) drawSliders();
};

const drawSliders = () => {
  const most = Math.ceil(props.seconds * 10) / 10;
  ends.forEach((end, i) => {
    const at = props.value[i];
    end.max = most;
    end.value = at;
    end.style.setProperty("--range_progress", `${(at / most) * 100}%`);
    end.setAttribute("aria-label", [text.from, text.to][i]);
    end.setAttribute("aria-valuetext", clock(at));
    const row = end.parentElement;
    row.querySelector(".name").textContent = [text.from, text.to][i];
    row.querySelector(".value").textContent = clock(at);
  });
};

const drawWaveform = () => {
  const wide = canvas.clientWidth, high = canvas.clientHeight, pairs = known("peaks").length / 2;
  if (!wide || !pairs) return;
  const sharp = devicePixelRatio || 1, style = getComputedStyle(root), pen = canvas.getContext("2d");
  const ink = style.getPropertyValue("--ink"), edge = style.getPropertyValue("--edge");
  const loudest = props.peaks.reduce((most, peak) => Math.max(most, Math.abs(peak)), 0.01);
  const [from, to] = region();
  canvas.width = Math.round(wide * sharp);
  canvas.height = Math.round(high * sharp);
  pen.scale(sharp, sharp);
  for (let x = 0; x < wide; x += 3) {
    const first = Math.floor((x / wide) * pairs);
    const after = Math.max(first + 1, Math.floor(((x + 3) / wide) * pairs));
    const part = props.peaks.slice(2 * first, 2 * Math.min(after, pairs));
    const top = Math.max(...part, 0) / loudest, bottom = Math.min(...part, 0) / loudest;
    const at = (x / wide) * props.seconds;
    pen.fillStyle = at >= from && at <= to ? ink : edge;
    const y = (high / 2) * (1 - top * 0.94);
    pen.fillRect(x, y, 2, Math.max(2, (high / 2) * (1 - bottom * 0.94) - y));
  }
  pen.fillStyle = ink;
  if (hasRegion()) for (const at of [from, to]) {
    pen.fillRect(clamp(0, (at / props.seconds) * wide - 1, wide - 2), 0, 2, high);
  }
  if (!sound.paused) pen.fillRect((sound.currentTime / props.seconds) * wide, 0, 1, high);
};

// Select a region of at least SHORTEST_S inside the file.
const select = (from, to) => {
  const low = clamp(0, toTenth(from), props.seconds - SHORTEST_S);
  props.value = [low, clamp(low + SHORTEST_S, to >= props.seconds ? to : toTenth(to), props.seconds)];
  paint();
};
const move = (i, at) => {
  const [from, to] = props.value;
  if (i === 0) select(Math.min(at, to - SHORTEST_S), to);
  else select(from, Math.max(at, from + SHORTEST_S));
};
ends.forEach((end, i) => {
  end.addEventListener("input", (event) => {
    event.stopPropagation();
    move(i, Number(end.value));
  });
  end.addEventListener("change", (event) => event.stopPropagation());
  end.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(i, toTenth(props.value[i]) + way * (event.shiftKey ? 1 : 0.1));
  });
});

let anchor = null, pressed = 0;
const timeAt = (event) => {
  const box = canvas.getBoundingClientRect();
  return clamp(0, (event.clientX - box.left) / box.width, 1) * props.seconds;
};
canvas.addEventListener("pointerdown", (event) => {
  if (!hasRegion() || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  const at = timeAt(event), [from, to] = region(), near = (10 / canvas.clientWidth) * props.seconds;
  anchor = Math.abs(at - from) < near ? to : Math.abs(at - to) < near ? from : at;
  pressed = event.clientX;
});
canvas.addEventListener("pointermove", (event) => {
  if (anchor === null || Math.abs(event.clientX - pressed) < 3) return;
  pressed = -Infinity;
  const at = timeAt(event);
  select(Math.min(anchor, at), Math.max(anchor, at));
});
for (const over of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(over, () => { anchor = null; });
}

const follow = () => {
  if (sound.paused) return paint();
  if (sound.currentTime >= region()[1]) sound.pause();
  paint();
  requestAnimationFrame(follow);
};
play.addEventListener("click", () => {
  if (!sound.paused) return sound.pause();
  if (sound.dataset.url !== props.url) {
    sound.src = props.url;
    sound.dataset.url = props.url;
  }
  sound.currentTime = region()[0];
  sound.play().then(follow, () => { props.message = text.unplayable; paint(); });
});
sound.addEventListener("pause", paint);

watch(["value", "state", "message", "peaks", "whole", "url"], () => {
  if (sound.dataset.url !== props.url) sound.pause();
  requestAnimationFrame(paint);
});
new ResizeObserver(() => requestAnimationFrame(paint)).observe(canvas);
paint();
