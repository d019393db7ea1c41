"""Words for songs: a seed becomes a brief and the lyrics that answer it, line by line.

Every line is a clause about something the brief names, and an ending that carries the rhyme. What
is written follows the request: sections in order, lines in each, rhyme, tone; a chorus comes back.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

THINGS = """
sea river harbour island lighthouse ocean shore tide wave boat sail anchor bridge water rain storm
thunder cloud wind snow winter frost ice summer sun sunrise sunset morning evening midnight dawn
spring autumn garden flower rose tree forest leaf field meadow mountain hill valley stone desert
sand star moon sky planet comet night dream shadow mirror window door key house room kitchen table
candle fire flame lantern light street city town village corner market station train railway road
highway car engine bicycle ticket suitcase letter postcard photograph telephone radio record
guitar piano violin drum song melody whisper voice silence echo heart hand smile kiss promise
secret memory story childhood mother father sister brother friend lover stranger neighbour dancer
sailor soldier king queen ghost angel bird swallow raven dove wolf horse cat dog fox butterfly
coffee wine bread honey apple lemon river-boat clock watch calendar hour year yesterday tomorrow
goodbye homecoming journey farewell reunion wedding birthday holiday school library book poem page
pencil paper painting colour silver gold diamond ring crown glass bottle cinema circus carnival
dancefloor neon rooftop balcony elevator factory machine robot satellite rocket computer screen
football stadium victory freedom courage hunger money work friday sunday weekend party
""".split()
CLAUSES = (
    """
the {n} is calling me|I can hear the {n}|I remember the {n}|we are dancing with the {n}
nothing but the {n}|I was waiting for the {n}|you were standing by the {n}|give me back the {n}
we were dreaming of the {n}|I am walking past the {n}|there is something in the {n}
every {a} {n} is turning|all I want is the {n}|the {a} {n} is shining|take me to the {n}
I have written down the {n}|nobody knows the {n}|I will follow the {n}|you and I and the {n}
we have lost the {a} {n}|hold me close to the {n}|I believe in the {n}|singing for the {a} {n}
the {n} is all we have|oh, the {a} {n}|I am leaving the {n}|and the {n} goes on
this {a} {n} is ours|tell me of the {n}|we come back to the {n}|show me the {a} {n}
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
HOOKS = (
    """
oh, {n}, oh, {n}|sing it for the {n}|come on, {n}|this is our {n}|carry me, {n}|we will find the {n}
never let go of the {n}|{n}, {n}, {n}|stay with me, {n}|we are one with the {n}
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
ENDINGS = [
    group.split("|")
    for group in """
in the middle of the night|until the morning light|and I hold on tight|slowly out of sight|and it feels all right|like a candle burning bright
at the breaking of the day|and I cannot stay away|in the same old way|when the skies are grey|more than words can say|and it leads the way
on the edge of town|when the sun goes down|and I will not drown|like a paper crown|turning upside down
down beside the sea|and you run to me|the way it ought to be|and my heart is free|like a memory
and I let it go|in the falling snow|soft and slow|more than you know|in the afterglow|with the lamps down low
in the turning of the year|and you are standing here|and the sky is clear|without any fear|whispered in my ear|and you draw me near
in the pouring rain|like a midnight train|and I try again|through the joy and pain|running in my vein
with the stars above|on the wings of a dove|and I call it love|like a velvet glove|that I am dreaming of
without a sound|till the lost is found|with my feet on the ground|and the world goes round|as we turn around
on the road ahead|for the words we said|with the dreams in my head|and the sky turns red|by a silver thread
underneath the stars|with our old guitars|over passing cars|and we count our scars|through the window bars
when the summer's gone|and we carry on|from the dusk to dawn|on the empty lawn|till the day is drawn
and it breaks my heart|right from the start|while we are apart|like a work of art|like an old sweetheart
and I close my eyes|under open skies|no more alibis|where the river lies|and the wind replies
and the bells will ring|and I hear you sing|like an early spring|holding everything|like a bird on the wing
and we stand as one|in the rising sun|till the night is done|when the race is run|and we've just begun
""".strip().split("\n")
]
TONES = {
    "sad melancholic lonely wistful heartbroken": "lonely fading broken silent empty".split(),
    "hopeful warm uplifting bright optimistic": "golden rising shining gentle open".split(),
    "angry fierce defiant rebellious raw": "burning bitter roaring restless jagged".split(),
    "tender romantic intimate loving soft": "tender quiet velvet faithful sleeping".split(),
    "dreamy mysterious hazy surreal dark": "distant silver drifting hidden midnight".split(),
    "playful funny cheerful happy joyful": "crazy dancing laughing sunny jumping".split(),
}
RHYMES: dict[str, Callable[[int], int]] = {  # line -> which of a quatrain's rhymes it takes
    "couplets": lambda line: line // 2,
    "alternate": lambda line: line // 4 * 2 + line % 2,
    "enclosed": lambda line: line // 4 * 2 + (line % 4 in (1, 2)),
}
BRIEFS = (
    """
{0}|a song about {0}|the {0} and the {1}|{0}, {1}|{0}, {1}, {2}|about the {0} I left behind
a {t} song about the {0} and the {1}|how I miss the {0}|two people meet by the {0}
someone who dreams of the {0} and never finds the {1}|waiting for the {0} at the {1}
leaving the {0}, going back to the {1}|the last {0} of the {1}|a love song to a {0}
I want a song about my {0}, with a {1} in it|a {0} and a {1} in the {2}|growing up with the {0}
write something {t} about a {0}|what the {0} said to the {1}
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
STRUCTURES = (
    """
verse, chorus, verse, chorus, bridge, chorus|verse, chorus|verse, chorus, verse, chorus|verse
intro, verse, chorus, verse, chorus, outro|verse, verse, chorus|verse, pre-chorus, chorus
verse, chorus, bridge, chorus|chorus, verse, chorus|verse, bridge, verse|verse, chorus, outro
intro, verse, pre-chorus, chorus, verse, pre-chorus, chorus|verse, hook, verse, hook|rap, hook
verse, chorus, solo, chorus|verse, chorus, interlude, verse, chorus|verse, verse, verse
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
WORDLESS = ("intro", "interlude", "solo", "outro")
RETURNING = ("chorus", "hook", "pre-chorus")
LONGEST = 44  # sung lines in a song that is learnt from


@dataclass(frozen=True)
class Draft:
    """A request as the lyrics room makes it, and an answer to it."""

    brief: str
    structure: str
    tone: str
    rhyme: str
    lines: int
    text: str


class Poet:
    """Writes the lines of one song about `things`, in a tone."""

    def __init__(self, rng: random.Random, things: list[str], colours: list[str], rhyme: str):
        self.rng, self.things, self.colours, self.rhyme = rng, things, colours, rhyme
        self.clauses = rng.sample(CLAUSES, len(CLAUSES))

    def _clause(self, forms: list[str]) -> str:
        if not forms:
            forms.extend(self.rng.sample(CLAUSES, len(CLAUSES)))
        thing, colour = self.rng.choice(self.things), self.rng.choice(self.colours)
        return forms.pop().format(n=thing, a=colour)

    def section(self, lines: int, forms: list[str]) -> list[str]:
        """So many lines, rhymed; an ending is not used twice."""
        groups = self.rng.sample(ENDINGS, len(ENDINGS))
        left = [self.rng.sample(group, len(group)) for group in groups]
        sung = []
        for line in range(lines):
            place = RHYMES[self.rhyme](line) if self.rhyme != "free" else line
            clause = self._clause(forms)
            sung.append(f"{clause[0].upper()}{clause[1:]} {left[place % len(left)].pop()}")
        return sung


def write(seed: int) -> Draft:
    """A request and its answer."""
    rng = random.Random(seed)
    things = rng.sample(THINGS, 3)
    words, colours = rng.choice(list(TONES.items()))
    tone = " and ".join(rng.sample(words.split(), rng.choice((1, 1, 2))))
    form = rng.choice(BRIEFS)
    brief = form.format(*things, t=tone)
    things = [thing for place, thing in enumerate(things) if f"{{{place}}}" in form]
    if rng.random() < 0.3:
        tone = ""
        if "{t}" not in form:
            colours = [rng.choice(group) for group in TONES.values()]
    structure = rng.choice(STRUCTURES)
    rhyme = rng.choice(("couplets", "couplets", "alternate", "enclosed", "free"))
    names = structure.split(", ")
    most = LONGEST // sum(name not in WORDLESS for name in names)
    lines = min(rng.choice((2, 3, 4, 4, 4, 4, 5, 6, 8, 12)), most)
    poet, known, blocks = Poet(rng, things, colours, rhyme), {}, []
    for name in names:
        if name in WORDLESS:
            sung = []
        elif name in RETURNING:
            forms = list(rng.sample(HOOKS, 3)) if name == "hook" else poet.clauses
            sung = known.setdefault(name, poet.section(lines, forms))
        else:
            sung = poet.section(lines, poet.clauses)
        blocks.append("\n".join([f"[{name}]", *sung]))
    return Draft(brief, structure, tone, rhyme, lines, "\n\n".join(blocks))
