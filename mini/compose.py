"""Composer: a seed becomes a short piece of music, note by note, with its metadata.

All times are latent frames (25 a second). A beat is a whole number of frames and every onset is
rounded to a frame, so one kind of note always meets the latent grid in the same way: the
autoencoder and the diffusion model see a finite dictionary of sounds instead of a continuum. Beats
are even numbers of frames: the diffusion model reads two frames at a time, and every beat begins
with one of those pairs.
"""

import random
from dataclasses import dataclass, field

FRAMES_PER_SECOND = 25
BEAT_FRAMES = tuple(range(10, 21, 2))  # 150, 125, 107, 94, 83, 75 bpm
PITCH_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
BASS_LOW, CHORD_LOW, LEAD_LOW = 36, 55, 70  # lowest MIDI pitch of each register
BASS_SPAN, CHORD_SPAN, LEAD_SPAN = 12, 12, 17  # semitones in each register
STEPS_PER_BEAT = 4

# Which parts play in which section of a song.
PARTS = {
    "intro": {"chords"},
    "verse": {"chords", "bass", "drums"},
    "chorus": {"chords", "bass", "drums", "lead"},
    "bridge": {"chords", "bass", "lead"},
    "outro": {"chords", "bass"},
}


def bpm_of(beat_frames: int) -> int:
    """The whole number that names a tempo of `beat_frames` latent frames a beat."""
    return round(60 * FRAMES_PER_SECOND / beat_frames)


@dataclass(frozen=True)
class Note:
    """One sound: onset and length in latent frames, MIDI pitch (0 for drums), level 0..1."""

    frame: int
    length: int
    pitch: int
    voice: str
    level: float


@dataclass(frozen=True)
class Style:
    """What makes a style: its words, tempi, voices and patterns (16 steps a 4/4 bar)."""

    names: tuple[str, ...]
    moods: tuple[str, ...]
    beats: tuple[int, ...]
    voices: dict[str, str]  # part -> voice of the renderer
    called: dict[str, str]  # part -> what a caption calls it
    chords: tuple[str, ...]
    bass: tuple[str, ...]
    drums: tuple[dict[str, str], ...]
    loops: tuple[tuple[int, ...], ...]
    minor: float
    sevenths: bool = False
    pulse: tuple[str, ...] = ()
    note_steps: tuple[int, ...] = (2, 2, 2, 4, 4, 6)


STYLES: dict[str, Style] = {
    "lofi": Style(
        names=("lofi", "lo-fi hip hop", "lofi beat"),
        moods=("chill", "mellow", "relaxed", "dusty", "cozy"),
        beats=(16, 18, 20),
        voices={"chords": "keys", "bass": "round_bass", "lead": "vibes"},
        called={"chords": "electric piano", "bass": "bass", "lead": "vibraphone"},
        chords=("x.....-...x...-.", "x.......x......."),
        bass=("x.....x.x.......", "x.......x...x..."),
        drums=(
            {"kick": "x.......x.x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        ),
        loops=((1, 4, 0, 5), (0, 5, 1, 4), (3, 4, 2, 5), (5, 3, 0, 4)),
        minor=0.5,
        sevenths=True,
    ),
    "house": Style(
        names=("house", "deep house", "house music"),
        moods=("driving", "club", "dancefloor", "groovy", "four on the floor"),
        beats=(12, 14),
        voices={"chords": "stab", "bass": "synth_bass", "lead": "pluck"},
        called={"chords": "synth stabs", "bass": "synth bass", "lead": "synth pluck"},
        chords=("..x...x...x...x.", "..x..x....x..x.."),
        bass=("..x...x...x...x.", "x.....x.x.....x."),
        drums=(
            {
                "kick": "x...x...x...x...",
                "clap": "....x.......x...",
                "open_hat": "..x...x...x...x.",
            },
        ),
        loops=((0, 5, 3, 4), (5, 3, 0, 4), (0, 0, 3, 4), (0, 3, 5, 4)),
        minor=0.6,
    ),
    "ambient": Style(
        names=("ambient", "ambient music", "ambient soundscape"),
        moods=("calm", "atmospheric", "dreamy", "slow", "peaceful"),
        beats=(14, 16, 18, 20),
        voices={"chords": "pad", "bass": "sub", "lead": "bell", "pulse": "harp"},
        called={"chords": "warm pad", "bass": "sub bass", "lead": "bells", "pulse": "harp"},
        chords=("x...............",),
        bass=("x...............", "x.......x......."),
        drums=(),
        loops=((0, 3, 0, 4), (5, 3, 0, 4), (0, 2, 3, 3), (0, 5, 3, 4)),
        minor=0.4,
        pulse=("x.-.x.-.x.-.x.-.",),
        note_steps=(4, 4, 8, 8),
    ),
    "chiptune": Style(
        names=("chiptune", "8-bit chiptune", "chiptune game music"),
        moods=("8-bit", "retro", "video game", "playful", "fast"),
        beats=(10, 12, 14),
        voices={"chords": "square", "bass": "triangle", "lead": "pulse_lead"},
        called={"chords": "square wave arpeggio", "bass": "triangle bass", "lead": "pulse lead"},
        chords=("arpeggio",),
        bass=("x.x.x.x.x.x.x.x.", "x...x...x...x.x."),
        drums=({"chip_kick": "x...x...x...x...", "chip_snare": "....x.......x..."},),
        loops=((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 4, 0), (0, 3, 4, 4)),
        minor=0.35,
    ),
}
WALTZ_DRUMS = {"kick": "x...........", "snare": "....x...x...", "hat": "x.x.x.x.x.x."}
FORMS = (
    ("intro", "verse", "chorus", "verse", "chorus", "bridge", "chorus", "outro"),
    ("intro", "verse", "chorus", "outro"),
    ("verse", "chorus", "bridge", "chorus", "outro"),
    ("verse", "chorus", "verse", "chorus"),
)


@dataclass(frozen=True)
class Section:
    """A stretch of the song: name, first frame, frames."""

    name: str
    frame: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A composed piece: its notes and all that captions, metadata and tests may say of it."""

    seed: int
    style: str
    beat_frames: int
    beats_per_bar: int
    tonic: int
    mode: str
    frames: int
    tagged: bool  # the form is given by section tags
    sections: tuple[Section, ...]
    parts: frozenset[str]
    notes: tuple[Note, ...] = field(repr=False)

    @property
    def bpm(self) -> int:
        return bpm_of(self.beat_frames)

    @property
    def key(self) -> str:
        return f"{PITCH_NAMES[self.tonic]} {self.mode}"

    @property
    def bar_frames(self) -> int:
        return self.beat_frames * self.beats_per_bar


def fold(pitch: int, low: int, span: int) -> int:
    """Moves a pitch by octaves into [low, low + span), to the lowest place that fits."""
    return low + (pitch - low) % 12 if span <= 12 or pitch >= low + span or pitch < low else pitch


class Band:
    """Writes the notes of one piece, part by part, onto the grid of its bars."""

    def __init__(
        self, rng: random.Random, style: Style, beat: int, beats_per_bar: int, tonic: int, mode: str
    ):
        self.rng, self.style, self.beat, self.tonic = rng, style, beat, tonic
        self.scale = SCALES[mode]
        self.steps = beats_per_bar * STEPS_PER_BEAT
        self.loop = rng.choice(style.loops)
        self.chord_pattern = rng.choice(style.chords)[: self.steps]
        self.bass_pattern = rng.choice(style.bass)[: self.steps]
        self.pulse_pattern = rng.choice(style.pulse)[: self.steps] if style.pulse else ""
        self.drum_patterns = rng.choice(style.drums) if style.drums else {}
        if self.drum_patterns and beats_per_bar == 3:
            self.drum_patterns = WALTZ_DRUMS
        self.motifs = (self._motif(), self._motif())
        self.notes: list[Note] = []

    def _at(self, bar_frame: int, step: int) -> int:
        """First frame of a sixteenth step, rounded to the latent grid."""
        return bar_frame + (step * self.beat + 2) // STEPS_PER_BEAT

    def _add(
        self, bar_frame: int, step: int, steps: int, pitch: int, voice: str, level: float = 1.0
    ) -> None:
        start, end = self._at(bar_frame, step), self._at(bar_frame, step + steps)
        self.notes.append(Note(start, max(1, end - start), pitch, voice, level))

    def _degree(self, degree: int) -> int:
        """Pitch of a scale degree above the tonic, octave free."""
        return self.tonic + self.scale[degree % 7] + 12 * (degree // 7)

    def _chord(self, bar: int) -> list[int]:
        root = self.loop[bar % len(self.loop)]
        offsets = (0, 2, 4, 6) if self.style.sevenths else (0, 2, 4)
        return [root + offset for offset in offsets]

    def _motif(self) -> list[tuple[int, int, int]]:
        """One bar of melody: (step, steps, degrees above the chord's root)."""
        step, degree, motif = 0, self.rng.choice((0, 2, 4)), []
        while step < self.steps:
            steps = min(self.rng.choice(self.style.note_steps), self.steps - step)
            if self.rng.random() < 0.85:
                motif.append((step, steps, degree))
            degree = max(-2, min(7, degree + self.rng.choice((-2, -1, -1, 1, 1, 2))))
            step += steps
        return motif

    def _held(self, pattern: str) -> list[tuple[int, int, float]]:
        """(step, steps, level) of a pattern's hits; 'x' strong, '-' soft; each lasts to the next."""
        hits = [(step, mark) for step, mark in enumerate(pattern) if mark in "x-"]
        ends = [step for step, _ in hits[1:]] + [len(pattern)]
        return [
            (s, end - s, 1.0 if mark == "x" else 0.7)
            for (s, mark), end in zip(hits, ends, strict=True)
        ]

    def chords(self, bar: int, frame: int) -> None:
        voice = self.style.voices["chords"]
        pitches = sorted(fold(self._degree(d), CHORD_LOW, CHORD_SPAN) for d in self._chord(bar))
        if self.chord_pattern.startswith("arp"):
            for step in range(0, self.steps, 2):
                self._add(frame, step, 2, pitches[step // 2 % len(pitches)], voice)
            return
        for step, steps, level in self._held(self.chord_pattern):
            for pitch in pitches:
                self._add(frame, step, steps, pitch, voice, level)

    def pulse(self, bar: int, frame: int) -> None:
        pitches = sorted(fold(self._degree(d), CHORD_LOW + 12, 12) for d in self._chord(bar)[:3])
        for count, (step, _, level) in enumerate(self._held(self.pulse_pattern)):
            self._add(frame, step, 4, pitches[count % 3], self.style.voices["pulse"], level)

    def bass(self, bar: int, frame: int) -> None:
        pitch = fold(self._degree(self._chord(bar)[0]), BASS_LOW, BASS_SPAN)
        for step, steps, level in self._held(self.bass_pattern):
            self._add(frame, step, min(steps, 8), pitch, self.style.voices["bass"], level)

    def lead(self, bar: int, frame: int) -> None:
        chord = self._chord(bar)
        for step, steps, degree in self.motifs[bar // 2 % 2]:
            target = chord[0] + degree
            if step % 8 == 0:  # strong beats take a chord tone
                target = min(
                    (c + octave for c in chord[:3] for octave in (-7, 0, 7)),
                    key=lambda d: abs(d - target),
                )
            pitch = fold(60 + self._degree(target), LEAD_LOW, LEAD_SPAN)
            self._add(frame, step, steps, pitch, self.style.voices["lead"])

    def drums(self, frame: int, fill: bool) -> None:
        for voice, pattern in self.drum_patterns.items():
            for step, mark in enumerate(pattern):
                if mark == "x" and not (fill and step >= self.steps - 4 and "kick" not in voice):
                    self.notes.append(Note(self._at(frame, step), 1, 0, voice, 1.0))
        if fill:
            voice = next(
                (v for v in self.drum_patterns if v in ("snare", "clap", "chip_snare")), None
            )
            for step in range(self.steps - 4, self.steps, 1 if self.beat >= 16 else 2):
                self.notes.append(Note(self._at(frame, step), 1, 0, voice, 0.7))


def compose(
    seed: int,
    seconds: float = 32.0,
    style: str | None = None,
    beat_frames: int | None = None,
    key: tuple[int, str] | None = None,
    tagged: bool | None = None,
) -> Piece:
    """Composes a piece of at least `seconds`; what is not given follows from the seed."""
    rng = random.Random(seed)
    name = style or rng.choice(tuple(STYLES))
    chosen = STYLES[name]
    beat = beat_frames or rng.choice(chosen.beats)
    beats_per_bar = 3 if name in ("lofi", "ambient") and rng.random() < 0.12 else 4
    mode = "minor" if rng.random() < chosen.minor else "major"
    tonic = rng.randrange(12)
    if key is not None:
        tonic, mode = key
    absent = {
        part
        for part, chance in (("drums", 0.06), ("bass", 0.06), ("lead", 0.25))
        if rng.random() < chance
    }
    if tagged is None:
        tagged = rng.random() < 0.3
    form = (
        rng.choice(FORMS)
        if tagged
        else ("verse", "chorus")
        if rng.random() < 0.5
        else ("chorus", "verse")
    )
    section_bars = rng.choice((2, 4)) if tagged else 4

    band = Band(rng, chosen, beat, beats_per_bar, tonic, mode)
    bar_frames, sections, parts, bar, count = beat * beats_per_bar, [], set(), 0, 0
    while bar * bar_frames < seconds * FRAMES_PER_SECOND:
        section = form[count % len(form)]
        sections.append(Section(section, bar * bar_frames, section_bars * bar_frames))
        playing = PARTS[section] - absent
        for inside in range(section_bars):
            frame = bar * bar_frames
            if "drums" in playing and band.drum_patterns:
                band.drums(frame, fill=inside == section_bars - 1 and rng.random() < 0.7)
                parts.add("drums")
            if chosen.pulse:
                band.pulse(bar, frame)
                parts.add("pulse")
            for part in ("chords", "bass", "lead"):
                if part in playing:
                    getattr(band, part)(bar, frame)
                    parts.add(part)
            bar += 1
        count += 1
    return Piece(
        seed=seed,
        style=name,
        beat_frames=beat,
        beats_per_bar=beats_per_bar,
        tonic=tonic,
        mode=mode,
        frames=bar * bar_frames,
        tagged=tagged,
        sections=tuple(sections),
        parts=frozenset(parts),
        notes=tuple(band.notes),
    )
