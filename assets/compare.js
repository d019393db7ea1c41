// Two takes that play at once, of which one is heard: switching changes gains and nothing else.
const $ = (part) => element.querySelector(part);
const $$ = (part) => [...element.querySelectorAll(part)];
const root = $(".ab"), play = $(".play"), at = $(".at");
const sides = $$(".pair button"), votes = $$(".votes button"), letters = ["A", "B"];
const FADE_S = 0.01, AHEAD_S = 0.05;
const known = (name, otherwise) => props[name] ?? otherwise;

let context = null, sounds = null, playing = null, loading = false, heard = 0, rest = 0, voted = null;
const takes = () => known("takes", []);
const named = () => !known("blind", false) || voted !== null;
const length = () => (sounds ? Math.max(...sounds.map((sound) => sound.duration)) : 0);
const level = (i) => 10 ** (takes()[i].gain_db / 20);
// Seconds into the takes. Both run on the same clock, so there is one answer.
const where = () => {
  if (!playing) return rest;
  return Math.min(length(), playing.from + Math.max(0, context.currentTime - playing.began));
};
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const dB = (value) => `${value < 0 ? "\u2212" : ""}${Math.abs(value).toFixed(1)}`;

const told = () => {
  if (!takes().length) return "";
  if (!named()) return say.blind;
  const each = takes().map(({ lufs, gain_db }, i) => {
    const loud = lufs === null ? say.silent : `${dB(lufs)} LUFS`;
    const down = gain_db < -0.005 ? `, ${say.down} ${dB(-gain_db)} dB` : "";
    return `${letters[i]}: ${loud}${down}`;
  });
  const name = voted === null ? "" : takes()[voted].name.replace(/…?$/, (end) => end || ".");
  const choice = name ? [`${say.chosen} ${letters[voted]}, ${name}`] : [];
  return [...choice, `${each.join("; ")}.`].join(" ");
};

const paint = (trouble = "") => {
  root.dataset.state = takes().length ? "ready" : "empty";
  root.setAttribute("aria-label", say.group);
  sides.forEach((side, i) => {
    const name = named() && takes()[i] ? takes()[i].name : "";
    const text = name ? `${letters[i]}  ${name}` : letters[i];
    if (side.textContent !== text) side.textContent = text;
    side.setAttribute("aria-pressed", i === heard);
  });
  $(".votes").hidden = !known("blind", false) || voted !== null;
  votes.forEach((vote, i) => { vote.textContent = say.vote.replace("{letter}", letters[i]); });
  play.textContent = playing ? say.stop : say.play;
  $(".how").textContent = say.how;
  const line = trouble || told();
  if ($(".told").textContent !== line) $(".told").textContent = line;
  tick();
};

const tick = () => {
  const now = where();
  at.max = Math.max(0.1, length());
  at.value = now;
  at.style.setProperty("--range_progress", `${(now / Math.max(0.1, length())) * 100}%`);
  at.setAttribute("aria-label", say.position);
  at.setAttribute("aria-valuetext", clock(now));
  $(".clock").textContent = clock(now);
};
const follow = () => {
  if (!playing) return;
  if (where() >= length()) {
    halt();
    rest = 0;
    return paint();
  }
  tick();
  requestAnimationFrame(follow);
};

const load = async () => {
  if (sounds) return;
  const wanted = known("turn", "");
  // The rate of every take: nothing is resampled on the way.
  context ??= new AudioContext({ sampleRate: 48000 });
  const found = await Promise.all(takes().map(async ({ url }) => {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(answer.status);
    return context.decodeAudioData(await answer.arrayBuffer());
  }));
  if (wanted === known("turn", "")) sounds = found;
};

const begin = (from) => {
  const began = context.currentTime + AHEAD_S;
  const voices = sounds.map((sound, i) => {
    const source = context.createBufferSource(), gain = context.createGain();
    source.buffer = sound;
    gain.gain.value = i === heard ? level(i) : 0;
    source.connect(gain).connect(context.destination);
    source.start(began, Math.min(from, sound.duration));
    return { source, gain };
  });
  playing = { voices, began, from };
  follow();
};
const halt = () => {
  if (!playing) return;
  rest = where();
  for (const { source, gain } of playing.voices) {
    source.stop();
    gain.disconnect();
  }
  playing = null;
};

const hear = (i) => {
  heard = i;
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
    halt();
    return paint();
  }
  // Not disabled meanwhile: that would take the focus, and the keys with it.
  if (loading) return;
  loading = true;
  try {
    if (!sounds) paint(say.loading);
    await load();
    await context.resume();
    if (sounds) begin(rest >= length() ? 0 : rest);
    paint();
  } catch {
    paint(say.gone);
  } finally {
    loading = false;
  }
});
sides.forEach((side, i) => side.addEventListener("click", () => hear(i)));
votes.forEach((vote, i) => vote.addEventListener("click", () => {
  voted = i;
  paint();
  sides[i].focus();
}));
at.addEventListener("input", (event) => {
  event.stopPropagation();
  const to = Number(at.value), again = playing !== null;
  halt();
  rest = to;
  if (again) begin(to);
  paint();
});
at.addEventListener("change", (event) => event.stopPropagation());
root.addEventListener("keydown", (event) => {
  const i = letters.indexOf(event.key.toUpperCase());
  if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  hear(i);
});

watch("turn", () => {
  halt();
  sounds = null;
  heard = rest = 0;
  voted = null;
  paint();
});
paint();
