"""Words for a piece: captions, lyrics with section tags, and the metadata the prompts carry."""

import math
import random

from mini.compose import BEAT_FRAMES, FRAMES_PER_SECOND, STYLES, Piece, bpm_of

ENHARMONIC = {"C#": "Db", "Eb": "D#", "F#": "Gb", "Ab": "G#", "Bb": "A#"}
LINES = (
    "morning light is on the water",
    "we are walking slowly home",
    "every window has a story",
    "leave the radio on low",
    "hold the night a little longer",
    "count the stars above the town",
    "rain is drumming on the rooftop",
    "turn the world the right way round",
    "I can hear the river calling",
    "dancing till the lights go out",
    "all the streets are made of silver",
    "sing it softly, sing it loud",
    "paper boats and summer evenings",
    "time is running through my hands",
    "follow me across the bridges",
    "nothing goes the way we planned",
)


def spell(key: str, rng: random.Random) -> str:
    """The key's name, now and then in its other spelling or with the musical signs."""
    name, mode = key.split()
    if name in ENHARMONIC and rng.random() < 0.15:
        name = ENHARMONIC[name]
    if rng.random() < 0.05:
        name = name.replace("#", "\u266f").replace("b", "\u266d")
    return f"{name} {mode}"


def bpm_near(piece: Piece, rng: random.Random) -> int:
    """Any whole tempo that lies nearest to the piece's own among the tempi of the grid."""
    half = (BEAT_FRAMES[1] - BEAT_FRAMES[0]) / 2
    low, high = piece.beat_frames + half, piece.beat_frames - half
    slowest, fastest = 60 * FRAMES_PER_SECOND / low, 60 * FRAMES_PER_SECOND / high
    return rng.randint(math.ceil(slowest), math.ceil(fastest) - 1)


def describe(piece: Piece) -> str:
    """The full and plain caption that the planner writes for a piece."""
    style = STYLES[piece.style]
    called = [style.called[p] for p in ("chords", "lead", "bass", "pulse") if p in piece.parts]
    called += ["drums"] if "drums" in piece.parts else []
    listed = ", ".join(called[:-1]) + " and " + called[-1] if len(called) > 1 else called[0]
    mood = style.moods[piece.seed % len(style.moods)]
    return f"A {mood} {style.names[0]} track with {listed}"


def caption(piece: Piece, rng: random.Random, mention: float = 0.15, bpm: int | None = None) -> str:
    """A caption as a musician might type it; tempo and key are named with chance `mention`.

    The tempo named is `bpm`, or the piece's own.
    """
    style = STYLES[piece.style]
    name = rng.choice(style.names)
    moods = rng.sample(style.moods, rng.choice((0, 1, 1, 2)))
    instruments = [
        style.called[part] for part in ("chords", "bass", "lead", "pulse") if part in piece.parts
    ]
    instruments += ["drums"] if "drums" in piece.parts else []
    if rng.random() < 0.4:
        rng.shuffle(instruments)
    if rng.random() < 0.5:
        instruments = instruments[: rng.randint(0, len(instruments))]
    more = []
    if style.drums and "drums" not in piece.parts and rng.random() < 0.7:
        more.append("no drums")
    if "lead" not in piece.parts and rng.random() < 0.4:
        more.append("no melody")
    if rng.random() < 0.2:
        more.append("instrumental")
    if rng.random() < mention:
        more.append(rng.choice(("{} bpm", "at {} bpm", "tempo {}")).format(bpm or piece.bpm))
    if rng.random() < mention:
        more.append(rng.choice(("in {}", "{}", "key of {}")).format(spell(piece.key, rng)))
    form = rng.random()
    if form < 0.3:
        return describe(piece) + "".join(f", {word}" for word in more)
    if form < 0.65:
        return ", ".join([name, *moods, *instruments, *more])
    if form < 0.85:
        listed = " and ".join(
            [", ".join(instruments[:-1]), instruments[-1]] if len(instruments) > 1 else instruments
        )
        opening = f"A {' '.join([*moods, name])} track" + (f" with {listed}" if listed else "")
        return ", ".join([opening, *more])
    return ", ".join([*moods, *instruments, name, *more])


def lyrics(piece: Piece, rng: random.Random, start: int, frames: int) -> str:
    """The tags of the sections that sound in a stretch, some with lines; else an instrumental."""
    if not piece.tagged:
        return rng.choice(("[Instrumental]", "[Instrumental]", "[instrumental]", ""))
    sounding = [
        s
        for s in piece.sections
        if s.frame + s.length > start + 25 and s.frame < start + frames - 25
    ]
    sung = rng.random() < 0.4
    blocks = []
    for section in sounding:
        tag = section.name if rng.random() < 0.5 else section.name.capitalize()
        lines = (
            rng.sample(LINES, 2) if sung and section.name in ("verse", "chorus", "bridge") else []
        )
        blocks.append("\n".join([f"[{tag}]", *lines]))
    return "\n\n".join(blocks)


def grid_tempi() -> list[int]:
    return [bpm_of(beat) for beat in BEAT_FRAMES]
