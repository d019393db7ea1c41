"""The planner: loading, composing codes, planning and listening."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_planner
import torch
from conftest import ROOT, drain
from safetensors.torch import load_file, save_file
from tiny_planner import CODEBOOK

from core.errors import StudioError
from core.music import KEYS
from core.results import Progress
from models import catalog, plan_format, plan_grammar, planner, qwen3
from models.plan_format import FIELDS, Plan
from models.planner import Planner
from models.token_sampling import GREEDY, SamplingParams

SAMPLING = SamplingParams(temperature=0.85, top_p=0.9, top_k=0)
WHOLE = Plan(92, "A calm piano piece", 30, "F# minor", "en", "4")


@pytest.fixture(autouse=True)
def short_captions(monkeypatch):
    """Random weights seldom end a caption: it takes all the tokens that it may have."""
    monkeypatch.setattr(plan_grammar, "CAPTION_TOKENS", 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_planner.write(tmp_path_factory.mktemp("planner") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))


def compose(tiny, seeds=(1,), seconds=6.0, plan=WHOLE, sampling=SAMPLING, **more):
    return drain(tiny.compose("piano", "[Instrumental]", plan, seconds, sampling, seeds, **more))


def test_the_largest_planner_that_fits_is_chosen():
    named = {
        gb: (size := catalog.largest_planner(gb)) and size.name
        for gb in (4, 6, 11.9, 12, 23, 24, 80)
    }
    assert named == {4: None, 6: "0.6B", 11.9: "0.6B", 12: "1.7B", 23: "1.7B", 24: "4B", 80: "4B"}


def test_the_original_layout_loads_with_nothing_missing(folder, tiny):
    from transformers import Qwen3ForCausalLM

    stored = load_file(folder / "model.safetensors")
    assert not any(name.startswith(("model.", "lm_head")) for name in stored)
    by_hand = Qwen3ForCausalLM(tiny.model.config).eval()
    prefixed = {f"model.{name}": tensor for name, tensor in stored.items()}
    by_hand.load_state_dict({**prefixed, "lm_head.weight": stored["embed_tokens.weight"]})
    ids = torch.tensor([tiny.vocabulary.encode(plan_format.plan_prompt("piano", "la la"))])
    with torch.inference_mode():
        assert torch.allclose(by_hand(ids).logits, tiny.model(ids).logits, atol=1e-5)
    assert tiny.output_head.data_ptr() == tiny.model.model.embed_tokens.weight.data_ptr()


def test_a_config_in_the_authors_older_form_loads_the_same(tmp_path):
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
    assert old.output_head.dtype == torch.float32


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


def test_a_planner_for_another_codebook_or_vocabulary_is_refused(tmp_path, folder):
    with pytest.raises(StudioError, match=f"audio code {tiny_planner.SLOTS}"):
        drain(Planner.load(folder, 64_000, "cpu", "float32"))
    small = tiny_planner.write(tmp_path, vocab_size=300)
    with pytest.raises(StudioError) as raised:
        drain(Planner.load(small, CODEBOOK, "cpu", "float32"))
    assert raised.value.code == "model-mismatch"


def test_five_codes_a_second_and_none_outside_the_codebook(tiny):
    for seconds in (10, 6.0, 6.39):
        (codes,) = compose(tiny, seconds=seconds, sampling=SamplingParams(3.0, 1.0, 0))
        assert len(codes) == int(seconds * 5)
        assert all(0 <= code < CODEBOOK for code in codes)
    assert len(set(codes)) > 10


def test_a_seed_has_the_same_codes_alone_and_among_others(tiny):
    three = compose(tiny, seeds=(1, 2, 3), guidance=2.0)
    assert three == [compose(tiny, seeds=(seed,), guidance=2.0)[0] for seed in (1, 2, 3)]
    assert len(set(map(tuple, three))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": SamplingParams(0.5, 0.9, 0)},
        {"sampling": SamplingParams(0.85, 0.3, 0)},
        {"sampling": SamplingParams(0.85, 0.9, 2)},
        {"guidance": 3.0},
        {"negative_prompt": "drums"},
        {"plan": Plan(93, "A calm piano piece", 30, "F# minor", "en", "4")},
    ],
)
def test_every_parameter_changes_the_codes(tiny, change):
    assert compose(tiny, guidance=2.0) != compose(tiny, **{"guidance": 2.0, **change})


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (2.5, ""), (2.5, "drums")])
def test_codes_are_those_of_transformers_with_two_whole_passes(tiny, guidance, negative):
    cond = tiny.vocabulary.encode(plan_format.codes_prompt("piano", "[Instrumental]", WHOLE))
    plain = tiny.vocabulary.encode(plan_format.unconditional_prompt(negative))
    first, expected = tiny.vocabulary.first_code, []
    for _ in range(20):
        with torch.inference_mode():
            both = [tiny.model(torch.tensor([ids])).logits[0, -1] for ids in (cond, plain)]
        logits = both[1] + guidance * (both[0] - both[1]) if guidance > 1 else both[0]
        expected.append(int(logits[first : first + CODEBOOK].argmax()))
        cond.append(first + expected[-1])
        plain.append(first + expected[-1])
    assert compose(
        tiny, seconds=4, sampling=GREEDY, guidance=guidance, negative_prompt=negative
    ) == [expected]


def test_bfloat16_composes_and_listens(folder):
    half = drain(Planner.load(folder, CODEBOOK, "cpu", "bfloat16"))
    assert half.output_head.dtype == torch.bfloat16
    (codes,) = compose(half, guidance=2.0)
    assert len(codes) == 30
    assert drain(half.understand(codes, SAMPLING, 1, lyrics=False))[0].keyscale in KEYS


def test_progress_counts_codes_to_the_end_and_closing_stops(tiny, monkeypatch):
    monkeypatch.setattr(planner, "PROGRESS_INTERVAL_S", 0.0)
    steps = tiny.compose("piano", "la", WHOLE, 4, SAMPLING, (1, 2))
    seen = [*steps]
    assert all(isinstance(p, Progress) and p.stage == "Composing codes" for p in seen)
    assert [p.step for p in seen] == [0, *range(1, 41), 40]
    assert {p.steps for p in seen} == {40}
    clock = iter(range(1000))
    with monkeypatch.context() as slow:
        slow.setattr(planner, "PROGRESS_INTERVAL_S", 4.5)
        slow.setattr(planner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        few = [p.step for p in tiny.compose("piano", "la", WHOLE, 4, SAMPLING, (1,))]
    assert 5 <= len(few) <= 8
    assert [p.step for p in tiny.compose("piano", "la " * 300, WHOLE, 1, SAMPLING, (1,))][:3] == [
        0,
        0,
        0,
    ]
    reads, read = [], qwen3.Qwen3.forward
    monkeypatch.setattr(qwen3.Qwen3, "forward", lambda *a: reads.append(1) or read(*a))
    stopped = tiny.compose("piano", "la", WHOLE, 4, SAMPLING, (1, 2))
    next(stopped), next(stopped)
    stopped.close()
    assert len(reads) <= 2


def test_prompts_longer_than_the_context_are_refused(tiny):
    for work in (
        tiny.compose("piano", "la la " * 3000, WHOLE, 30, SAMPLING, (1,)),
        tiny.plan("piano", "la la " * 3000, FIELDS, {}, SAMPLING, 1),
    ):
        with pytest.raises(StudioError) as raised:
            drain(work)
        assert raised.value.code == "lyrics-too-long"
        number, unit = raised.value.facts["length"].split()
        assert unit == "words"
        assert 0 < int(number.replace(",", "")) < 6000


def test_a_plan_is_legal_depends_on_the_seed_and_keeps_given_values(tiny):
    given = {"bpm": 121, "duration": 30}

    def plan(seed, wanted=FIELDS, sampling=SAMPLING):
        return drain(tiny.plan("piano", "la", wanted, given, sampling, seed, 240))

    plans = [plan(seed) for seed in (1, 2)]
    for made in plans:
        assert (made.bpm, made.duration_s) == (121, 30)
        assert None not in (made.keyscale, made.language, made.timesignature)
    assert plans == [plan(seed) for seed in (1, 2)]
    assert plans[0] != plans[1]
    few = ("keyscale", "timesignature")
    assert plan(1, few).fields().keys() == {"bpm", "duration", *few}
    assert len({plan(seed, few) for seed in range(6)}) > 1
    assert plan(1, few, GREEDY) == plan(2, few, GREEDY)
    hot = SamplingParams(5.0, 1.0, 0)
    assert len({plan(seed, ("language",), hot).language for seed in range(6)}) == 1
    assert len({plan(1, few, SamplingParams(t, 1.0, 0)) for t in (0.0, 0.5, 1.0, 2.0, 4.0)}) > 1


def test_a_greedy_plan_is_the_most_likely_legal_one(tiny):
    """The first choices against transformers' own logits."""
    prompt = plan_format.plan_prompt("piano", "la") + "<think>\nkeyscale:"
    tree, chosen = tiny.vocabulary.value_trie("keyscale", 600), []
    while tree:
        ids = torch.tensor([[*tiny.vocabulary.encode(prompt), *chosen]])
        with torch.inference_mode():
            logits = tiny.model(ids).logits[0, -1]
        chosen.append(max(tree, key=lambda token: float(logits[token])))
        tree = tree[chosen[-1]]
    made = drain(tiny.plan("piano", "la", ("keyscale",), {}, GREEDY, 1))
    assert made.keyscale == tiny.vocabulary.decode(chosen).strip()


def test_large_sets_of_legal_tokens_are_sampled_like_small_ones(tiny, monkeypatch):
    def write():
        return drain(tiny.plan("piano", "la", FIELDS, {}, SAMPLING, 3))

    small = write()
    monkeypatch.setattr(planner, "FEW_TOKENS", 0)
    assert write() == small


def test_a_plan_with_every_field_given_computes_nothing(tiny, monkeypatch):
    monkeypatch.setattr(qwen3.Qwen3, "forward", None)
    given = {"bpm": 90, "duration": 30, "language": "no", "timesignature": "6"}
    assert drain(tiny.plan("piano", "la", ("bpm",), given, SAMPLING, 1)) == Plan(
        bpm=90, duration_s=30, language="no", timesignature="6"
    )


def spied(tiny, monkeypatch):
    """The texts that are tokenised."""
    texts, ids = [], tiny.vocabulary.encode
    monkeypatch.setattr(tiny.vocabulary, "encode", lambda text: texts.append(text) or ids(text))
    return texts


def test_understanding_writes_a_complete_plan(tiny, monkeypatch):
    texts = spied(tiny, monkeypatch)
    plan, lyrics = drain(tiny.understand([1, 2, 3], SAMPLING, 1, lyrics=False))
    assert texts[0] == plan_format.understand_prompt([1, 2, 3])
    assert None not in (plan.bpm, plan.duration_s, plan.keyscale, plan.language)
    assert lyrics == ""
    long = [*range(CODEBOOK)] * 120  # longer than the context: the beginning is read
    assert drain(tiny.understand(long, SAMPLING, 1))[0].bpm
    other, _ = drain(tiny.understand([9, 9, 9, 9], SAMPLING, 1, lyrics=False))
    assert other != plan
    with pytest.raises(ValueError, match="0 to 39"):
        drain(tiny.understand([CODEBOOK], SAMPLING, 1))


def test_genres_are_written_unless_the_config_lists_the_fields_without_them(tmp_path, tiny):
    mine = tiny_planner.write(tmp_path)
    fields = [name for name in FIELDS if name != "genres"]
    spoil_config(mine, plan_fields=fields)
    without = drain(Planner.load(mine, CODEBOOK, "cpu", "float32"))
    for work in (
        lambda planner: planner.understand([1, 2], SAMPLING, 1, lyrics=False),
        lambda planner: planner.rewrite("storm", "la", {}, SAMPLING, 1),
    ):
        assert drain(work(tiny))[0].genres
        assert drain(work(without))[0].genres is None


def test_edition_1_has_its_own_keys_and_captions(tiny, monkeypatch):
    monkeypatch.setattr(plan_grammar, "SIGNED_KEYS", ("C\u266f major",))
    monkeypatch.setattr(tiny.vocabulary, "_tries", {})
    monkeypatch.setattr(plan_grammar, "CAPTION_TOKENS", 700)

    def plans(edition):
        fields = ("caption", "keyscale")
        yield drain(tiny.plan("piano", "la", fields, {}, SAMPLING, 1, 240, edition))
        yield drain(tiny.understand([1, 2], SAMPLING, 1, False, fields, edition))[0]

    for old, new in zip(plans(1), plans(2), strict=True):
        assert new.keyscale == "C# major" != old.keyscale
        assert len(old.caption) <= 512 < len(new.caption)


def test_inspire_and_rewrite_use_their_own_prompts_and_keep_given_values(tiny, monkeypatch):
    monkeypatch.setattr(plan_grammar, "LYRIC_TOKENS", 20)
    texts = spied(tiny, monkeypatch)
    plan, lyrics = drain(tiny.inspire("a storm", True, SAMPLING, 1, language="de"))
    assert texts[0] == plan_format.inspire_prompt("a storm", True)
    assert plan.language == "de"
    assert lyrics
    texts.clear()
    plan, lyrics = drain(tiny.rewrite("storm", "la la", {"bpm": 77}, SAMPLING, 1))
    assert texts[0] == plan_format.rewrite_prompt("storm", "la la")
    assert plan.bpm == 77
    assert isinstance(lyrics, str)


EMBEDDED = ROOT / "vendor" / "ace-step-mini" / "planner"


def test_the_embedded_planner_follows_a_caption_and_understands_codes():
    tokenizer = json.loads((EMBEDDED.parent / "audio_tokenizer" / "config.json").read_text())
    codebook = 1
    for level in tokenizer["fsq_input_levels"] or (8, 8, 8, 5, 5, 5):
        codebook *= level
    mini = drain(Planner.load(EMBEDDED, codebook, "cpu", "float32"))
    plans = [
        drain(mini.plan(f"lofi, {bpm} bpm", "[Instrumental]", FIELDS, {"duration": 30}, GREEDY, 1))
        for bpm in (75, 100, 150)
    ]
    assert all(plan.caption and plan.keyscale for plan in plans)
    assert (
        sum(abs(p.bpm / bpm - 1) < 0.04 for p, bpm in zip(plans, (75, 100, 150), strict=True)) >= 2
    )
    (codes,) = drain(mini.compose("lofi", "[Instrumental]", plans[0], 12, SAMPLING, (1,), 2.0))
    assert len(codes) == 60
    heard, _ = drain(mini.understand(codes, GREEDY, 1, lyrics=False))
    assert heard.bpm
    assert heard.keyscale
