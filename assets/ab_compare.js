// Both takes play at once, one of them at gain 0: switching changes gains and nothing else.
const $ = (part) => element.querySelector(part);
const $$ = (part) => [...element.querySelectorAll(part)];
const root = $(".ab-player"), play = $(".play"), slider = $(".position");
const sides = $$(".pair button"), votes = $$(".votes button"), letters = ["A", "B"];
const FADE_S = 0.01, AHEAD_S = 0.05;
const known = (name, otherwise) => props[name] ?? otherwise;

let context = null, buffers = null, playing = null, loading = false, active = 0, pausedAt = 0, voted = null;
const takes = () => known("takes", []);
const showsNames = () => !known("blind", false) || voted !== null;
const length = () => (buffers ? Math.max(...buffers.map((buffer) => buffer.duration)) : 0);
const level = (i) => 10 ** (takes()[i].gain_db / 20);
// Seconds into the takes, which share a clock.
const position = () => {
  if (!playing) return pausedAt;
  return Math.min(length(), playing.from + Math.max(0, context.currentTime - playing.began));
};
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const dB = (value) => `${value < 0 ? "\u2212" : ""}${Math.abs(value).toFixed(1)}`;

const summary = () => {
  if (!takes().length) return "";
  if (!showsNames()) return text.blind;
  const each = takes().map(({ lufs, gain_db }, i) => {
    const loud = lufs === null ? text.silent : `${dB(lufs)} LUFS`;
    const down = gain_db < -0.005 ? `, ${text.down} ${dB(-gain_db)} dB` : "";
    return `${letters[i]}: ${loud}${down}`;
  });
  const name = voted === null ? "" : takes()[voted].name.replace(/…?$/, (end) => end || ".");
  const choice = name ? [`${text.chosen} ${letters[voted]}, ${name}`] : [];
  return [...choice, `${each.join("; ")}.`].join(" ");
};

const paint = (trouble = "") => {
  root.dataset.state = takes().length ? "ready" : "empty";
  root.setAttribute("aria-label", text.group);
  sides.forEach((side, i) => {
    const name = showsNames() && takes()[i] ? takes()[i].name : "";
    const label = name ? `${letters[i]}  ${name}` : letters[i];
    if (side.textContent !== label) side.textContent = label;
    side.setAttribute("aria-pressed", i === active);
  });
  $(".votes").hidden = !known("blind", false) || voted !== null;
  votes.forEach((vote, i) => { vote.textContent = text.vote.replace("{letter}", letters[i]); });
  play.textContent = playing ? text.stop : text.play;
  $(".help").textContent = text.help;
  const line = trouble || summary();
  if ($(".message").textContent !== line) $(".message").textContent = line;
  drawPosition();
};

const drawPosition = () => {
  const now = position();
  slider.max = Math.max(0.1, length());
  slider.value = now;
  slider.style.setProperty("--range_progress", `${(now / Math.max(0.1, length())) * 100}%`);
  slider.setAttribute("aria-label", text.position);
  slider.setAttribute("aria-valuetext", clock(now));
  $(".clock").textContent = clock(now);
};
const follow = () => {
  if (!playing) return;
  if (position() >= length()) {
    pause();
    pausedAt = 0;
    return paint();
  }
  drawPosition();
  requestAnimationFrame(follow);
};

const load = async () => {
  if (buffers) return;
  const wanted = known("turn", "");
  // The sample rate of every take, so that nothing is resampled.
  context ??= new AudioContext({ sampleRate: 48000 });
  const found = await Promise.all(takes().map(async ({ url }) => {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(answer.status);
    return context.decodeAudioData(await answer.arrayBuffer());
  }));
  if (wanted === known("turn", "")) buffers = found;
};

const start = (from) => {
  const began = context.currentTime + AHEAD_S;
  const voices = buffers.map((buffer, i) => {
    const source = context.createBufferSource(), gain = context.createGain();
    source.buffer = buffer;
    gain.gain.value = i === active ? level(i) : 0;
    source.connect(gain).connect(context.destination);
    source.start(began, Math.min(from, buffer.duration));
    return { source, gain };
  });
  playing = { voices, began, from };
  follow();
};
const pause = () => {
  if (!playing) return;
  pausedAt = position();
  for (const { source, gain } of playing.voices) {
    source.stop();
    gain.disconnect();
  }
  playing = null;
};

const select = (i) => {
  active = i;
  if (playing) {
    const now = context.currentTime;
    playing.voices.forEach(({ gain }, j) => {
      gain.gain.cancelScheduledValues(now);
      gain.gain.setValueAtTime(gain.gain.value, now);
      gain.gain.linearRampToValueAtTime(j === i ? level(j) : 0, now + FADE_S);
    });
  }
  paint();
};

play.addEventListener("click", async () => {
  if (playing) {
    pause();
    return paint();
  }
  // The button stays enabled: disabling it would lose the focus and the keys.
  if (loading) return;
  loading = true;
  try {
    if (!buffers) paint(text.loading);
    await load();
    await context.resume();
    if (buffers) start(pausedAt >= length() ? 0 : pausedAt);
    paint();
  } catch {
    paint(text.gone);
  } finally {
    loading = false;
  }
});
sides.forEach((side, i) => side.addEventListener("click", () => select(i)));
votes.forEach((vote, i) => vote.addEventListener("click", () => {
  voted = i;
  paint();
  sides[i].focus();
}));
slider.addEventListener("input", (event) => {
  event.stopPropagation();
  const to = Number(slider.value), again = playing !== null;
  pause();
  pausedAt = to;
  if (again) start(to);
  paint();
});
slider.addEventListener("change", (event) => event.stopPropagation());
root.addEventListener("keydown", (event) => {
  const i = letters.indexOf(event.key.toUpperCase());
  if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(i);
});

watch("turn", () => {
  pause();
  buffers = null;
  active = pausedAt = 0;
  voted = null;
  paint();
});
paint();
