"""The planner: formats to the byte, legal plans from any logits, codes by the book."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest
import tiny_planner
import torch
import yaml
from conftest import ROOT, drain, song
from safetensors.torch import load_file, save_file
from tiny_planner import CODEBOOK

from core.errors import StudioError
from core.requests import KEYS, LANGUAGES, TIME_SIGNATURES
from core.results import Progress
from models import catalog, plan_grammar, planner, qwen3
from models.plan_grammar import FIELDS, Plan, Thought, Words
from models.planner import Planner, SamplingParams, pick

DICE = SamplingParams(temperature=0.85, top_p=0.9, top_k=0)
SURE = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)
WHOLE = Plan(92, "A calm piano piece", 30, "F# minor", "en", "4")


@pytest.fixture(scope="module")
def words():
    return Words(tiny_planner.tokenizer(), CODEBOOK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_planner.write(tmp_path_factory.mktemp("planner") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))


def compose(tiny, seeds=(1,), seconds=6.0, plan=WHOLE, dice=DICE, **more):
    return drain(tiny.compose("piano", "[Instrumental]", plan, seconds, dice, seeds, **more))


# --- what the model reads


def test_prompts_are_those_of_the_training_to_the_byte():
    system = "<|im_start|>system\n# Instruction\n{}\n\n<|im_end|>\n<|im_start|>user\n"
    made = system.format("Generate audio semantic tokens based on the given conditions:")
    asked = "# Caption\nlofi\n\n# Lyric\n[Verse]\nhi\n<|im_end|>\n<|im_start|>assistant\n"
    assert plan_grammar.plan_prompt("lofi", "[Verse]\nhi") == made + asked
    thought = (
        "<think>\nbpm: 92\ncaption: A calm piano piece\nduration: 30\nkeyscale: F# minor\n"
        "language: en\ntimesignature: 4\n</think>\n\n"
    )
    assert plan_grammar.codes_prompt("lofi", "[Verse]\nhi", WHOLE) == made + asked + thought
    plain = made + "{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for negative in ("", " \n", "NO USER INPUT"):
        assert plan_grammar.plain_prompt(negative) == plain.format("NO USER INPUT")
    assert plan_grammar.plain_prompt(" drums, noise") == plain.format(" drums, noise")
    heard = system.format(
        "Understand the given musical conditions and describe the audio semantics accordingly:"
    )
    assert plan_grammar.understand_prompt([12, 345]) == (
        heard + "<|audio_code_12|><|audio_code_345|><|im_end|>\n<|im_start|>assistant\n"
    )
    inspire = system.format(
        "Expand the user's input into a more detailed and specific musical description:"
    )
    for query, shown in (("a storm", "a storm"), ("  ", "NO USER INPUT")):
        assert plan_grammar.inspire_prompt(query, True) == (
            f"{inspire}{shown}\n\ninstrumental: true<|im_end|>\n<|im_start|>assistant\n"
        )
    rewrite = system.format(
        "Format the user's input into a more detailed and specific musical description:"
    )
    assert plan_grammar.rewrite_prompt("", "") == (
        f"{rewrite}# Caption\nNO USER INPUT\n\n# Lyric\n[Instrumental]<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_plan_is_written_by_pyyaml_as_in_training():
    long = "A melancholic piano ballad: " + "soft strings and a distant choir, " * 5
    plan = Plan(bpm=92, caption=long.strip(), language="no", timesignature="6")
    text = plan.text()
    assert text == (
        "bpm: 92\n"
        "caption: 'A melancholic piano ballad: soft strings and a distant choir, soft strings\n"
        "  and a distant choir, soft strings and a distant choir, soft strings and a distant\n"
        "  choir, soft strings and a distant choir,'\n"
        "language: 'no'\n"
        "timesignature: 6"
    )
    assert plan_grammar.parse(f"<think>\n{text}\n</think>").caption == long.strip()
    assert Plan(caption="träum \u266a").text() == "caption: träum \u266a"
    assert Plan().text() == ""


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("language: no", "language", "no"),
        ("caption: key: C, tempo: #1", "caption", "key: C, tempo: #1"),
        ("caption: one\n  two: three\n   four", "caption", "one two: three four"),
        ("caption: 'it''s\n  quoted: here'", "caption", "it's quoted: here"),
        ('caption: "half', "caption", "half"),
        ('caption: "a\\\n  \\ b"', "caption", "a b"),
        ("keyscale: F\u266f minor", "keyscale", "F# minor"),
        ("timesignature: 6/8", "timesignature", "6"),
        ("timesignature: 5", "timesignature", None),
        ("bpm: 301", "bpm", None),
        ("bpm: fast", "bpm", None),
        ("duration: 184", "duration_s", 184),
        ("duration: 5", "duration_s", None),
        ("keyscale: H major", "keyscale", None),
        ("genres: jazz", "caption", None),
    ],
)
def test_a_thought_is_read_line_by_line(line, field, value):
    assert getattr(plan_grammar.parse(f"<think>\n{line}\n</think>\n\nbpm: 77"), field) == value


def test_lyrics_are_freed_of_their_headings():
    tail = "</think>\n\n{}<|im_end|>"
    for shown in (
        "[Verse]\nhi\n",
        "# Lyric\n[Verse]\nhi",
        "# Languages\nen\n\n# Lyrics\n[Verse]\nhi",
        "# Lyric\n[Verse]\nhi\n\n# Languages\nen\n",
    ):
        assert plan_grammar.parse_lyrics(tail.format(shown)) == "[Verse]\nhi"
    assert plan_grammar.parse_lyrics("<think>\nbpm: 90\n</think>") == ""


def test_captions_are_capped_at_a_hundred_words_and_a_styles_letters():
    assert plan_grammar.capped(" two\n  words\x00 ") == "two words"
    assert plan_grammar.capped("w " * 150) == " ".join("w" * 100)
    assert len(plan_grammar.capped("abcdefghi " * 90)) <= 512
    assert plan_grammar.capped("abcdefghi " * 90).endswith("abcdefghi")
    assert plan_grammar.capped("One two three. " * 40).endswith("three.")
    assert len(plan_grammar.capped("x" * 600)) == 512


# --- what the model may write


def think(words, rng, wanted, given, taste=None, **more):
    """A thought filled by dice, or by a taste for certain tokens where they are legal."""
    thought = Thought(words, wanted, given, **more)
    asks = thought.asks()
    token = None
    try:
        while True:
            ask = asks.send(token)
            liked = [t for t in taste or () if t in ask.legal] if rng.random() < 0.5 else ()
            token = rng.choice(liked or ask.legal)
            if ask.greedy and rng.random() < 0.4:
                token = ask.legal[-1]
    except StopIteration:
        return thought


def hold_to_the_law(thought, wanted, given):
    text, plan = thought.text(), thought.plan()
    assert re.fullmatch(r"<think>\n(.*\n)?</think>", text, re.DOTALL), text
    assert not re.search(r"`|<\|\w+\|>", text)
    begun = [line.partition(":")[0] for line in text.split("\n")[1:-1] if line[:1] not in " \t"]
    assert begun == [field for field in FIELDS if field in wanted or field in given]
    for field, value in given.items():
        assert f"\n{field}: {value}\n" in text
    said = plan.said()
    assert set(begun) - set(said) <= (
        {"caption"} if re.search(r"\ncaption:[\s'\"]+\n", text) else set()
    )
    assert {k: said[k] for k in given} == {
        k: int(v) if k == "timesignature" else v for k, v in given.items()
    }
    assert yaml.safe_load(plan.text() or "{}") == said
    assert plan.bpm is None or 30 <= plan.bpm <= 300
    assert plan.duration_s is None or 10 <= plan.duration_s <= 240
    assert plan.keyscale in (None, *KEYS)
    assert plan.language in (None, *LANGUAGES)
    assert plan.timesignature in (None, *TIME_SIGNATURES)
    assert plan.caption is None or (len(plan.caption) <= 512 and "\n" not in plan.caption)


def test_any_logits_make_a_legal_plan(words):
    values = {
        "bpm": 121, "duration": 31, "keyscale": "Bb major", "language": "no", "timesignature": "6",
    }  # fmt: skip
    nasty = [
        t for text in (":", " #", "'", '"', ".\n", "\n", " ", "-", "[") for t in words.ids(text)
    ]
    for seed in range(2000):
        rng = random.Random(seed)
        wanted = [field for field in FIELDS if rng.random() < 0.8]
        given = {field: value for field, value in values.items() if rng.random() < 0.2}
        taste = nasty if seed % 2 else None
        thought = think(words, rng, wanted, given, taste, longest_s=240)
        hold_to_the_law(thought, wanted, given)


def test_a_caption_that_will_not_end_is_ended(words):
    letter = words.ids("a")
    letter, thought = words.ids("a"), Thought(words, ["caption"], {"timesignature": "4"})
    asks = thought.asks()
    next(asks)
    said = sum(1 for _ in iter(lambda: next_or_none(asks, letter[0]), None))
    assert said == 511
    assert thought.text().endswith("a\ntimesignature: 4\n</think>")


def next_or_none(asks, token):
    try:
        return asks.send(token)
    except StopIteration:
        return None


def test_a_caption_needs_something_visible_before_its_line_ends(words):
    ask = next(Thought(words, ["caption"], {}).asks())
    assert not set(ask.legal) & words.ending
    assert words.ids(".\n")[0] in words.ending


@pytest.mark.parametrize("field", ["bpm", "duration", "keyscale", "language", "timesignature"])
def test_the_tree_holds_each_legal_value_and_no_other(words, field):
    found = []

    def walk(node, path):
        for token, further in node.items():
            if token == words.newline:
                assert not further
                found.append(words.text(path))
            else:
                walk(further, [*path, token])

    walk(words.tree(field, 240), [])
    legal = {
        "bpm": range(30, 301),
        "duration": range(10, 241),
        "keyscale": KEYS,
        "language": LANGUAGES,
        "timesignature": TIME_SIGNATURES,
    }[field]
    assert sorted(found) == sorted(f" {value}" for value in legal)


def test_what_is_forced_is_what_the_tokenizer_makes_of_the_whole(words):
    given = {"bpm": 121, "caption": "A calm piano", "duration": 31, "keyscale": "Bb major"}
    given |= {"language": "en", "timesignature": "4"}
    thought = Thought(words, [], given)
    assert [*thought.asks()] == []
    whole = "".join(f"{field}: {value}\n" for field, value in given.items())
    assert thought.tokens == words.ids(f"<think>\n{whole}</think>")


def test_only_the_language_and_line_ends_are_chosen_greedily(words):
    asks = Thought(words, ["language"], {}).asks()
    assert next(asks).greedy
    assert not next(Thought(words, ["bpm"], {}).asks()).greedy
    assert not next(Thought(words, ["keyscale"], {}).asks()).greedy


def test_free_text_follows_a_thought_only_where_asked_and_holds_no_codes(words):
    thought = think(words, random.Random(0), [], {"bpm": 90}, lyrics=50)
    assert "</think>\n\n" in thought.text()
    assert "audio_code" not in thought.text()
    stopped = think(words, random.Random(0), [], {"bpm": 90}, [words.stop], lyrics=50)
    assert stopped.tokens.index(words.stop) == len(stopped.tokens) - 1


# --- what is made of a plan


def test_what_the_person_set_stays_and_the_rest_is_filled():
    plan = Plan(92, "Warm piano", 30, "F# minor", "de", "3")
    filled, used = plan_grammar.fill(song(bpm=120, keyscale="C major"), plan)
    assert (filled.bpm, filled.keyscale) == (120, "C major")
    assert used == {"prompt": "Warm piano", "timesignature": "3", "vocal_language": "de"}
    assert {name: getattr(filled, name) for name in used} == used
    same, used = plan_grammar.fill(
        song(vocal_language="en", timesignature="4"), Plan(language="de")
    )
    assert (same, used) == (song(vocal_language="en", timesignature="4"), {})


def test_a_request_gives_what_it_settles():
    asked = song(bpm=120, keyscale="C major", vocal_language="de", timesignature="3")
    assert plan_grammar.given_by(asked, 12.7) == {
        "bpm": 120, "duration": 12, "keyscale": "C major", "language": "de", "timesignature": "3",
    }  # fmt: skip
    assert plan_grammar.given_by(song(), 700) == {"duration": 600}


def test_the_planner_that_fits_the_memory():
    named = {
        gb: (size := catalog.largest_planner(gb)) and size.name
        for gb in (4, 6, 11.9, 12, 23, 24, 80)
    }
    assert named == {4: None, 6: "0.6B", 11.9: "0.6B", 12: "1.7B", 23: "1.7B", 24: "4B", 80: "4B"}


# --- the model


def test_the_original_layout_loads_with_nothing_missing(folder, tiny):
    from transformers import Qwen3ForCausalLM

    stored = load_file(folder / "model.safetensors")
    assert not any(name.startswith(("model.", "lm_head")) for name in stored)
    by_hand = Qwen3ForCausalLM(tiny.model.config).eval()
    prefixed = {f"model.{name}": tensor for name, tensor in stored.items()}
    by_hand.load_state_dict({**prefixed, "lm_head.weight": stored["embed_tokens.weight"]})
    ids = torch.tensor([tiny.words.ids(plan_grammar.plan_prompt("piano", "la la"))])
    with torch.inference_mode():
        assert torch.allclose(by_hand(ids).logits, tiny.model(ids).logits, atol=1e-5)
    assert tiny.table.data_ptr() == tiny.model.model.embed_tokens.weight.data_ptr()


def test_a_config_as_the_authors_saved_it_means_the_same(tmp_path):
    """Before transformers 5 the base of the positions stood alone, and the dtype had a prefix."""
    folder = tiny_planner.write(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "dtype"):
        described.pop(name)
    described |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}
    described |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 2}
    (folder / "config.json").write_text(json.dumps(described))
    old = drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))
    expected = 1e6 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(old.model.model.rotary_emb.inv_freq, expected)
    assert old.table.dtype == torch.float32


def test_a_planner_saved_with_prefixes_is_the_same(tmp_path, tiny):
    other = tiny_planner.write(tmp_path, prefix="model.")
    prefixed = drain(Planner.load(other, CODEBOOK, "cpu", "float32"))
    assert compose(prefixed) == compose(tiny)


def spoil_tensor(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILS = {
    "lacks a tensor": lambda f: spoil_tensor(f, lambda w: w.pop("layers.1.mlp.up_proj.weight")),
    "holds NaN": lambda f: spoil_tensor(f, lambda w: w["norm.weight"].fill_(float("nan"))),
    "holds more": lambda f: spoil_tensor(f, lambda w: w.update(extra=torch.zeros(3))),
    "is cut off": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]
    ),
    "has no weights": lambda f: (f / "model.safetensors").unlink(),
    "has no words": lambda f: (f / "tokenizer.json").unlink(),
    "has words that are none": lambda f: (f / "tokenizer.json").write_text("{}"),
    "has no head": lambda f: spoil_config(f, tie_word_embeddings=False),
    "is another model": lambda f: spoil_config(f, model_type="llama"),
    "sees a window only": lambda f: spoil_config(f, layer_types=["sliding_attention"] * 2),
    "has biases": lambda f: spoil_config(f, attention_bias=True),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_planner_is_refused_by_name(tmp_path, spoil):
    folder = tiny_planner.write(tmp_path / "mine")
    SPOILS[spoil](folder)
    with pytest.raises(StudioError) as raised:
        drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))
    assert raised.value.code == "model-broken"
    assert "mine" in str(raised.value)


def test_a_planner_that_does_not_fit_is_refused(tmp_path, folder):
    with pytest.raises(StudioError, match=f"audio code {tiny_planner.SLOTS}"):
        drain(Planner.load(folder, 64_000, "cpu", "float32"))
    small = tiny_planner.write(tmp_path, vocab_size=300)
    with pytest.raises(StudioError) as raised:
        drain(Planner.load(small, CODEBOOK, "cpu", "float32"))
    assert raised.value.code == "model-mismatch"


def test_reading_on_equals_transformers_reading_all(tiny):
    """A padded pair, read in pieces, against each text alone and whole."""
    texts = [
        tiny.words.ids(plan_grammar.plan_prompt("piano", "la la")),
        tiny.words.ids("bpm: 92\n"),
    ]
    more = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    for rows in ([0, 1], [1, 0], [0]):
        track = qwen3.KeyValueCache(tiny.qwen, [texts[row] for row in rows], 6)
        seen = [track.read(track.texts), *(track.read(more[rows, i : i + 1]) for i in range(3))]
        seen.append(track.read(more[rows, 3:]))
        for place, row in enumerate(rows):
            whole = torch.tensor([[*texts[row], *more[row].tolist()]])
            with torch.inference_mode():
                ours = torch.stack([hidden[place] for hidden in seen])
                theirs = tiny.model.model(whole).last_hidden_state[0]
            at = [len(texts[row]) - 1 + i for i in (0, 1, 2, 3, 6)]
            assert torch.allclose(ours, theirs[at], atol=1e-4), (rows, row)


def test_a_prompt_read_in_pieces_is_the_same(tiny):
    texts = [[*range(20)], [*range(7)]]
    whole, pieces = (qwen3.KeyValueCache(tiny.qwen, texts, 0) for _ in range(2))
    expected = whole.read(whole.texts)
    for piece in pieces.texts.split(3, 1):
        found = pieces.read(piece)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_norm_by_hand_is_torchs():
    x, weight = torch.randn(2, 3, 16), torch.randn(16)
    assert torch.allclose(
        qwen3.norm(x, weight, 1e-6), torch.rms_norm(x, (16,), weight, 1e-6), atol=1e-6
    )


# --- the dice


def test_dice_follow_the_authors_order():
    """Top-k, then top-p before the temperature, then the temperature: shares of even draws."""
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    for dice in (
        SamplingParams(1.0, 1.0, 0),
        SamplingParams(2.0, 0.7, 0),
        SamplingParams(0.5, 1.0, 3),
        SamplingParams(3.0, 0.6, 4),
    ):
        wanted = logits.double()
        order = wanted.argsort(descending=True)
        if dice.top_k:
            wanted[order[dice.top_k :]] = -torch.inf
        shares = wanted.softmax(0)
        ahead = shares[order].cumsum(0) - shares[order]
        if dice.top_p < 1:
            wanted[order[ahead > dice.top_p]] = -torch.inf
        wanted = (wanted / dice.temperature).softmax(0)
        draws = (torch.arange(2000) + 0.5) / 2000
        found = torch.stack([pick(logits, draw, dice) for draw in draws])
        assert torch.allclose(torch.bincount(found, minlength=5) / 2000, wanted.float(), atol=2e-3)


def test_dice_never_fall_on_what_is_left_out():
    logits = torch.full((4000,), -torch.inf)
    logits[torch.tensor([7, 1300])] = torch.tensor([0.1, 0.3])
    almost_one = torch.tensor(1 - 2**-24)
    for dice in (
        SamplingParams(0.7, 0.9, 0),
        SamplingParams(1.3, 1.0, 0),
        SamplingParams(1.0, 1.0, 9),
    ):
        for draw in (torch.tensor(0.0), almost_one):
            assert int(pick(logits, draw, dice)) in (7, 1300)
    assert int(pick(logits, almost_one, SURE)) == 1300


# --- composing


def test_five_codes_a_second_and_none_outside_the_codebook(tiny):
    for seconds in (10, 6.0, 6.39):
        (codes,) = compose(tiny, seconds=seconds, dice=SamplingParams(3.0, 1.0, 0))
        assert len(codes) == int(seconds * 5)
        assert all(0 <= code < CODEBOOK for code in codes)
    assert len(set(codes)) > 10


def test_a_seed_means_the_same_codes_alone_and_among_others(tiny):
    three = compose(tiny, seeds=(1, 2, 3), guidance=2.0)
    assert three == [compose(tiny, seeds=(seed,), guidance=2.0)[0] for seed in (1, 2, 3)]
    assert len(set(map(tuple, three))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"dice": SamplingParams(0.5, 0.9, 0)},
        {"dice": SamplingParams(0.85, 0.3, 0)},
        {"dice": SamplingParams(0.85, 0.9, 2)},
        {"guidance": 3.0},
        {"negative": "drums"},
        {"plan": Plan(93, "A calm piano piece", 30, "F# minor", "en", "4")},
    ],
)
def test_every_knob_changes_the_codes(tiny, change):
    assert compose(tiny, guidance=2.0) != compose(tiny, **{"guidance": 2.0, **change})


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (2.5, ""), (2.5, "drums")])
def test_codes_are_those_of_transformers_with_two_whole_passes(tiny, guidance, negative):
    cond = tiny.words.ids(plan_grammar.codes_prompt("piano", "[Instrumental]", WHOLE))
    plain = tiny.words.ids(plan_grammar.plain_prompt(negative))
    first, expected = tiny.words.first_code, []
    for _ in range(20):
        with torch.inference_mode():
            both = [tiny.model(torch.tensor([ids])).logits[0, -1] for ids in (cond, plain)]
        logits = both[1] + guidance * (both[0] - both[1]) if guidance > 1 else both[0]
        expected.append(int(logits[first : first + CODEBOOK].argmax()))
        cond.append(first + expected[-1])
        plain.append(first + expected[-1])
    assert compose(tiny, seconds=4, dice=SURE, guidance=guidance, negative=negative) == [expected]


def test_bfloat16_composes_and_listens(folder):
    half = drain(Planner.load(folder, CODEBOOK, "cpu", "bfloat16"))
    assert half.table.dtype == torch.bfloat16
    (codes,) = compose(half, guidance=2.0)
    assert len(codes) == 30
    assert drain(half.understand(codes, DICE, 1, lyrics=False))[0].keyscale in KEYS


def test_progress_runs_up_to_the_end_and_closing_stops(tiny, monkeypatch):
    monkeypatch.setattr(planner, "PULSE_S", 0.0)
    steps = tiny.compose("piano", "la", WHOLE, 4, DICE, (1, 2))
    seen = [*steps]
    assert all(isinstance(p, Progress) and p.stage == "Composing codes" for p in seen)
    assert [p.step for p in seen] == [0, *range(1, 41), 40]
    assert {p.steps for p in seen} == {40}
    clock = iter(range(1000))
    with monkeypatch.context() as slow:
        slow.setattr(planner, "PULSE_S", 4.5)
        slow.setattr(planner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        few = [p.step for p in tiny.compose("piano", "la", WHOLE, 4, DICE, (1,))]
    assert 5 <= len(few) <= 8
    assert [p.step for p in tiny.compose("piano", "la " * 300, WHOLE, 1, DICE, (1,))][:3] == [
        0,
        0,
        0,
    ]
    reads, read = [], qwen3.KeyValueCache.read
    monkeypatch.setattr(qwen3.KeyValueCache, "read", lambda *a: reads.append(1) or read(*a))
    stopped = tiny.compose("piano", "la", WHOLE, 4, DICE, (1, 2))
    next(stopped), next(stopped)
    stopped.close()
    assert len(reads) <= 2


def test_words_without_end_are_refused(tiny):
    for work in (
        tiny.compose("piano", "la la " * 3000, WHOLE, 30, DICE, (1,)),
        tiny.plan("piano", "la la " * 3000, FIELDS, {}, DICE, 1),
    ):
        with pytest.raises(StudioError) as raised:
            drain(work)
        assert raised.value.code == "lyrics-too-long"
        assert 0 < raised.value.facts["words"] < 6000


# --- planning and listening


def test_a_plan_is_legal_repeatable_and_leaves_what_is_given(tiny):
    given = {"bpm": 121, "duration": 30}

    def plan(seed, wanted=FIELDS, dice=DICE):
        return drain(tiny.plan("piano", "la", wanted, given, dice, seed, 240))

    plans = [plan(seed) for seed in (1, 2)]
    for made in plans:
        assert (made.bpm, made.duration_s) == (121, 30)
        assert None not in (made.keyscale, made.language, made.timesignature)
    assert plans == [plan(seed) for seed in (1, 2)]
    assert plans[0] != plans[1]
    few = ("keyscale", "timesignature")
    assert plan(1, few).said().keys() == {"bpm", "duration", *few}
    assert len({plan(seed, few) for seed in range(6)}) > 1
    assert plan(1, few, SURE) == plan(2, few, SURE)
    hot = SamplingParams(5.0, 1.0, 0)
    assert len({plan(seed, ("language",), hot).language for seed in range(6)}) == 1
    assert len({plan(1, few, SamplingParams(t, 1.0, 0)) for t in (0.0, 0.5, 1.0, 2.0, 4.0)}) > 1


def test_a_greedy_plan_is_the_likeliest_of_the_legal(tiny):
    """The first choices against transformers' own logits."""
    prompt = plan_grammar.plan_prompt("piano", "la") + "<think>\nkeyscale:"
    tree, chosen = tiny.words.tree("keyscale", 600), []
    while tree:
        ids = torch.tensor([[*tiny.words.ids(prompt), *chosen]])
        with torch.inference_mode():
            logits = tiny.model(ids).logits[0, -1]
        chosen.append(max(tree, key=lambda token: float(logits[token])))
        tree = tree[chosen[-1]]
    made = drain(tiny.plan("piano", "la", ("keyscale",), {}, SURE, 1))
    assert made.keyscale == tiny.words.text(chosen).strip()


def test_large_sets_are_chosen_from_like_small_ones(tiny, monkeypatch):
    def write():
        return drain(tiny.plan("piano", "la", FIELDS, {}, DICE, 3))

    small = write()
    monkeypatch.setattr(planner, "FEW", 0)
    assert write() == small


def test_a_plan_with_nothing_to_find_computes_nothing(tiny, monkeypatch):
    monkeypatch.setattr(qwen3.KeyValueCache, "read", None)
    given = {"bpm": 90, "duration": 30, "language": "no", "timesignature": "6"}
    assert drain(tiny.plan("piano", "la", ("bpm",), given, DICE, 1)) == Plan(
        bpm=90, duration_s=30, language="no", timesignature="6"
    )


def spied(tiny, monkeypatch):
    """The texts that the tokenizer is given."""
    texts, ids = [], tiny.words.ids
    monkeypatch.setattr(tiny.words, "ids", lambda text: texts.append(text) or ids(text))
    return texts


def test_listening_hears_a_whole_plan(tiny, monkeypatch):
    texts = spied(tiny, monkeypatch)
    plan, lyrics = drain(tiny.understand([1, 2, 3], DICE, 1, lyrics=False))
    assert texts[0] == plan_grammar.understand_prompt([1, 2, 3])
    assert None not in (plan.bpm, plan.duration_s, plan.keyscale, plan.language)
    assert lyrics == ""
    long = [*range(CODEBOOK)] * 120  # more than the model can count, and still it hears
    assert drain(tiny.understand(long, DICE, 1))[0].bpm
    other, _ = drain(tiny.understand([9, 9, 9, 9], DICE, 1, lyrics=False))
    assert other != plan
    with pytest.raises(ValueError, match="0 to 39"):
        drain(tiny.understand([CODEBOOK], DICE, 1))


def test_helpers_ask_in_their_own_words_and_keep_what_is_given(tiny, monkeypatch):
    monkeypatch.setattr(plan_grammar, "LYRIC_TOKENS", 20)
    texts = spied(tiny, monkeypatch)
    plan, lyrics = drain(tiny.inspire("a storm", True, DICE, 1, language="de"))
    assert texts[0] == plan_grammar.inspire_prompt("a storm", True)
    assert plan.language == "de"
    assert lyrics
    texts.clear()
    plan, lyrics = drain(tiny.rewrite("storm", "la la", {"bpm": 77}, DICE, 1))
    assert texts[0] == plan_grammar.rewrite_prompt("storm", "la la")
    assert plan.bpm == 77
    assert isinstance(lyrics, str)


EMBEDDED = ROOT / "vendor" / "ace-step-mini" / "planner"


def test_the_embedded_planner_follows_words_and_hears_codes():
    tokenizer = json.loads((EMBEDDED.parent / "audio_tokenizer" / "config.json").read_text())
    codebook = 1
    for level in tokenizer["fsq_input_levels"] or (8, 8, 8, 5, 5, 5):
        codebook *= level
    mini = drain(Planner.load(EMBEDDED, codebook, "cpu", "float32"))
    plans = [
        drain(mini.plan(f"lofi, {bpm} bpm", "[Instrumental]", FIELDS, {"duration": 30}, SURE, 1))
        for bpm in (75, 100, 150)
    ]
    assert all(plan.caption and plan.keyscale for plan in plans)
    assert (
        sum(abs(p.bpm / bpm - 1) < 0.04 for p, bpm in zip(plans, (75, 100, 150), strict=True)) >= 2
    )
    (codes,) = drain(mini.compose("lofi", "[Instrumental]", plans[0], 12, DICE, (1,), 2.0))
    assert len(codes) == 60
    heard, _ = drain(mini.understand(codes, SURE, 1, lyrics=False))
    assert heard.bpm
    assert heard.keyscale
