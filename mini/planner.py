"""The 5Hz planner: a small Qwen3 that writes a plan and audio codes, or reads codes and describes them.

Prompt formats and token names are those of the large model; ids and counts are read from the
tokenizer by whoever uses it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mini.attention import use_grouped_attention
from mini.captions import bpm_near, caption, describe, lyrics
from mini.compose import BEAT_FRAMES, FRAMES_PER_SECOND, Piece
from mini.dataset import FRAMES, Corpus
from mini.model import READ, WINDOW, heads, reading
from mini.prompts import (
    END,
    NUMBERS,
    SECTION_TAGS,
    key_names,
    order_embeddings,
    sample_texts,
    train_bpe,
)
from mini.resume import BEGINNING
from mini.train_tokens import Codes
from mini.training import Run, Trained, fit, rank

GENERATE = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"
INSPIRE = "Expand the user's input into a more detailed and specific musical description:"
REWRITE = "Format the user's input into a more detailed and specific musical description:"
NOTHING = "NO USER INPUT"
CODES_PER_SECOND = FRAMES_PER_SECOND // WINDOW
START, STOP, THINK, THOUGHT = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
FIELDS = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH, LAYERS = 192, 7
SPREAD = 0.05  # of an embedding's numbers
LISTENING, TELLING = 0.4, 0.06  # of the turns
PLANS, LISTENS = 0.25, 0.4  # of the batches only plan, in short; only listen, all as long
NAMED = 0.85  # how often a batch of plans names the tempo, and the key
HEARD_SECONDS = (6, 10, 25)  # of a planned piece's codes, at most
FACT_WEIGHT = 4.0  # of numbers and keys among the words of an answer
CODE_WEIGHT, READ_WEIGHT = 0.5, 2.0  # of the codes' loss and the reader's error beside the words'
TEMPO_WEIGHT, EAR = 1.0, 25  # of the ear for tempo; after so many codes, 5 s, it must know
HELD_BATCHES = 8
TEMPI = slice(4, 4 + len(BEAT_FRAMES))  # of a reading


def code_token(code: int) -> str:
    return f"<|audio_code_{code}|>"


def planner_tokenizer(folder: Path, codes: int, pieces: int = 600) -> PreTrainedTokenizerFast:
    """The planner's tokenizer with `codes` audio codes: read from `folder` or made and written."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_bpe(sample_texts(pieces), 700, lowercase=False, special=[END, START, STOP])
    phrases = [f"# Instruction\n{text}\n\n" for text in (GENERATE, UNDERSTAND, INSPIRE, REWRITE)]
    phrases += [
        "# Caption\n",
        "\n\n# Lyric\n",
        "# Lyric\n",
        "\n\ninstrumental: ",
        NOTHING,
        *(f"{field}:" for field in FIELDS),
    ]
    tags = [*SECTION_TAGS, *(tag.title() for tag in SECTION_TAGS)]
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in (THINK, THOUGHT, *phrases, *tags)]
    )
    tokenizer.add_tokens(
        [AddedToken(name, single_word=True, normalized=False) for name in key_names()]
    )
    tokenizer.add_tokens([AddedToken(str(n), single_word=True, normalized=False) for n in NUMBERS])
    tokenizer.add_tokens([AddedToken(code_token(code), normalized=False) for code in range(codes)])
    tokenizer.eos_token = STOP
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def chat(instruction: str, user: str) -> str:
    """System and user turn, and the assistant's opened: what the template renders."""
    system = f"{START}system\n# Instruction\n{instruction}\n\n{STOP}\n"
    return f"{system}{START}user\n{user}{STOP}\n{START}assistant\n"


def generate_prompt(words: str, sung: str) -> str:
    return chat(GENERATE, f"# Caption\n{words}\n\n# Lyric\n{sung}\n")


def think(plan: dict[str, object]) -> str:
    """The plan as the model writes it; an empty one leaves one empty line."""
    text = yaml.dump(plan, allow_unicode=True, sort_keys=True).strip() if plan else ""
    return f"{THINK}\n{text}\n{THOUGHT}\n\n"


def plan_of(
    piece: Piece, seconds: int, rng: random.Random, bpm: int | None = None
) -> dict[str, object]:
    return {
        "bpm": bpm or piece.bpm,
        "caption": describe(piece),
        "duration": seconds,
        "keyscale": piece.key,
        "language": "en" if piece.tagged else rng.choice(("en", "unknown")),
        "timesignature": piece.beats_per_bar,
    }


@torch.no_grad()
def encode_codes(codes: Codes, corpus: Corpus, folder: Path) -> np.ndarray:
    """Code ids (pieces, 5, n) of a corpus, at each of the five offsets of a code's window.

    Every file of latents gets one of codes beside it, so that a corpus may grow.
    """
    count = FRAMES // WINDOW - 1
    use_grouped_attention(codes)
    for first, shard in zip(corpus.firsts, corpus.shards, strict=True):
        path = folder / f"codes-{first}.npy"
        if path.exists():
            continue
        ids = np.zeros((len(shard), WINDOW, count), np.int16)
        for row, latents in enumerate(shard):
            windows = torch.from_numpy(latents.astype(np.float32)).unfold(0, count * WINDOW, 1)
            ids[row] = codes.encode(windows[:WINDOW].transpose(1, 2))[1].numpy()
        np.save(path, ids)
    return read_codes(corpus, folder)


def read_codes(corpus: Corpus, folder: Path) -> np.ndarray:
    """The codes (pieces, 5, n) that `encode_codes` wrote."""
    return np.concatenate([np.load(folder / f"codes-{first}.npy") for first in corpus.firsts])


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer, as ids; what sounds (n, READ) from place `music_at` on; a gap in the
    positions, for music longer than any of the corpus."""

    prompt: list[int]
    answer: list[int]
    music_at: int
    music_reading: Tensor
    gap_at: int = 0
    gap: int = 0


class Conversations(IterableDataset):
    """Endless batches of planning and listening, as ids, labels and positions."""

    def __init__(
        self,
        corpus: Corpus,
        codes: np.ndarray,
        tokenizer: PreTrainedTokenizerFast,
        batch: int,
        seed: int,
    ):
        self.corpus, self.codes, self.tokenizer, self.batch, self.seed = (
            corpus,
            codes,
            tokenizer,
            batch,
            seed,
        )
        self.first_code = tokenizer.convert_tokens_to_ids(code_token(0))
        self.stop = tokenizer.convert_tokens_to_ids(STOP)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _codes(self, index: int, start: int, count: int) -> list[int]:
        """Token ids of `count` codes from latent frame `start` on."""
        row = self.codes[index, start % WINDOW, start // WINDOW : start // WINDOW + count]
        return [self.first_code + int(code) for code in row]

    def _planning(self, rng: random.Random, mention: float = 0.5, plays: bool = True) -> Turn:
        """A plan and codes from words, or codes from nothing; the plan alone if it does not play."""
        index = rng.randrange(len(self.corpus))
        piece = self.corpus.pieces[index]
        starts = range(0, FRAMES - 12 * FRAMES_PER_SECOND, 4 * piece.bar_frames)
        start = rng.choice(starts)
        fitting = (self.codes.shape[2] * WINDOW - start) // FRAMES_PER_SECOND
        fitting = min(fitting, rng.choice(HEARD_SECONDS))
        seconds = rng.randint(10, 60)
        bpm = bpm_near(piece, rng) if rng.random() < 0.5 else piece.bpm
        words = caption(piece, rng, mention, bpm)
        sung = lyrics(piece, rng, start, seconds * FRAMES_PER_SECOND) or "[Instrumental]"
        plan = plan_of(piece, seconds, rng, bpm if str(bpm) in words else None)
        for field, chance in (("caption", 0.25), ("language", 0.2)):
            if rng.random() < chance:
                del plan[field]
        prompt = generate_prompt(words, sung)
        if plays and rng.random() < 0.06:
            prompt, plan = chat(GENERATE, NOTHING), {}
        elif rng.random() < 0.04:
            prompt = chat(GENERATE, f"# Lyric\n{sung}\n")
        prompt_ids, thought = self._ids(prompt), self._ids(think(plan))
        if not plays:
            return Turn(prompt_ids, thought, 0, torch.zeros(0, READ))
        music = self._codes(index, start, min(seconds, fitting) * CODES_PER_SECOND)
        music_reading = reading(piece, start, len(music) * WINDOW, WINDOW)
        whole = seconds <= fitting
        gap = 0 if whole else rng.randint(0, (seconds - fitting) * CODES_PER_SECOND)
        gap_at = len(prompt_ids) + len(thought)
        if not plan:  # an empty thought is part of the prompt
            prompt_ids, thought = prompt_ids + thought, []
        answer = thought + music + [self.stop] * whole
        return Turn(prompt_ids, answer, gap_at, music_reading, gap_at, gap)

    def _listening(self, rng: random.Random, seconds: int = 0) -> Turn:
        """A plan and lyrics from the codes of so many seconds, or of any."""
        index = rng.randrange(len(self.corpus))
        piece = self.corpus.pieces[index]
        whole = self.codes.shape[2] * WINDOW
        start = rng.randrange(whole - (seconds or 10) * FRAMES_PER_SECOND)
        seconds = seconds or rng.randint(6, (whole - start) // FRAMES_PER_SECOND)
        music = self._codes(index, start, seconds * CODES_PER_SECOND)
        head, tail = map(self._ids, chat(UNDERSTAND, "\0").split("\0"))
        sung = lyrics(piece, rng, start, seconds * FRAMES_PER_SECOND) or "[Instrumental]"
        answer = [*self._ids(think(plan_of(piece, seconds, rng)) + sung), self.stop]
        music_reading = reading(piece, start, len(music) * WINDOW, WINDOW)
        return Turn(head + music + tail, answer, len(head), music_reading)

    def _telling(self, rng: random.Random) -> Turn:
        """A plan and lyrics from an idea, or from a style and lyrics that are kept."""
        piece = rng.choice(self.corpus.pieces)
        seconds = rng.randint(10, 60)
        sung = lyrics(piece, rng, 0, seconds * FRAMES_PER_SECOND) or "[Instrumental]"
        bpm = bpm_near(piece, rng)
        words = caption(piece, rng, mention=0.4, bpm=bpm)
        if rng.random() < 0.5:
            idea = words if rng.random() < 0.8 else NOTHING
            wordless = str(not piece.tagged).lower()
            prompt = chat(INSPIRE, f"{idea}\n\ninstrumental: {wordless}")
        else:
            prompt = chat(REWRITE, f"# Caption\n{words}\n\n# Lyric\n{sung}")
        plan = plan_of(piece, seconds, rng, bpm if str(bpm) in words else None)
        answer = [*self._ids(think(plan) + sung), self.stop]
        return Turn(self._ids(prompt), answer, 0, torch.zeros(0, READ))

    def _turn(self, rng: random.Random) -> Turn:
        chance = rng.random()
        if chance < LISTENING:
            return self._listening(rng)
        return self._telling(rng) if chance < LISTENING + TELLING else self._planning(rng)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            kind = rng.random()
            if kind < PLANS:  # a third as long, so there may be more of them
                turns = [self._planning(rng, NAMED, plays=False) for _ in range(3 * self.batch)]
            elif kind < PLANS + LISTENS:
                seconds = rng.randint(10, 24)
                turns = [self._listening(rng, seconds) for _ in range(self.batch)]
            else:
                turns = [self._turn(rng) for _ in range(self.batch)]
            length = -(-max(len(turn.prompt) + len(turn.answer) for turn in turns) // 32) * 32
            ids = torch.full((len(turns), length), self.tokenizer.pad_token_id)
            labels = torch.full((len(turns), length), -100)
            positions = torch.arange(length).repeat(len(turns), 1)
            music_reading = torch.full((len(turns), length, READ), torch.nan)
            for row, turn in enumerate(turns):
                end = len(turn.prompt) + len(turn.answer)
                ids[row, :end] = torch.tensor(turn.prompt + turn.answer)
                labels[row, len(turn.prompt) : end] = torch.tensor(turn.answer)
                music_reading[row, turn.music_at : turn.music_at + len(turn.music_reading)] = (
                    turn.music_reading
                )
                positions[row, turn.gap_at :] += turn.gap
            yield {
                "ids": ids,
                "labels": labels,
                "positions": positions,
                "music_reading": music_reading,
            }


@torch.no_grad()
def sound_of_codes(codes: Codes, count: int, width: int) -> Tensor:
    """What each code sounds like, as the rows (count, width) of an embedding with unit spread.

    The five frames a code alone is decoded to, along their `width` directions of most variance.
    """
    quantizer = codes.tokenizer.quantizer
    latents = codes.detokenizer(
        quantizer.get_output_from_indices(torch.arange(count)[None, :, None])
    )
    frames = latents[0].unflatten(0, (count, WINDOW)).flatten(1)
    frames = frames - frames.mean(0)
    _, _, directions = torch.linalg.svd(frames, full_matrices=False)
    turned = frames @ directions[:width].T @ torch.linalg.qr(torch.randn(width, width))[0]
    return turned / turned.std()


def build_planner(
    tokenizer: PreTrainedTokenizerFast, width: int = WIDTH, layers: int = LAYERS
) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(STOP),
        bos_token_id=None,
        attn_implementation="eager",
        **heads(width),
    )
    planner = Qwen3ForCausalLM(config)
    order_embeddings(planner.model.embed_tokens.weight.data, tokenizer, scale=SPREAD)
    return planner


class Heard(nn.Module):
    """The planner, and in training two linear readers of its layers at every code.

    The one on the middle layer predicts tempo, place in the bar, scale and style (`reading`) of what
    has sounded up to there: many times the teaching that one plan a piece gives. The ear, one layer
    below the last, predicts the tempo alone: how fast the places go by takes a layer more than the
    places, and the last is left to a plan that gathers what all codes say. They are not exported.
    """

    def __init__(self, planner: Qwen3ForCausalLM):
        super().__init__()
        self.planner = planner
        width, layers = planner.config.hidden_size, planner.model.layers
        self.reader, self.ear = nn.Linear(width, READ), nn.Linear(width, len(BEAT_FRAMES))
        self.kept: dict[str, Tensor] = {}
        for name, number in (("reader", len(layers) // 2), ("ear", max(0, len(layers) - 2))):
            layers[number].register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.kept[name] = output

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, L, width), the reader's guesses (B, L, READ), the ear's scores."""
        hidden = self.planner.model(input_ids=batch["ids"], position_ids=batch["positions"])
        read, tempo = (
            getattr(self, name)(self.kept.pop(name)).float() for name in ("reader", "ear")
        )
        return hidden.last_hidden_state, read, tempo


def mean(values: Tensor) -> Tensor:
    """The mean, 0 of none: a batch of plans alone has neither codes nor sound."""
    return values.sum() / max(1, values.numel())


class TrainedPlanner(Trained):
    """Next-token loss over the answers, and the reader's error; words and codes are logged apart."""

    def __init__(
        self, steps: int, planner: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast,
        rate: float = 1.5e-3,
    ):  # fmt: skip
        super().__init__(steps, rate, warmup=100, decay=0.02, average=0.995)
        self.model = Heard(planner)
        self.first_code = tokenizer.convert_tokens_to_ids(code_token(0))
        facts = [*map(str, NUMBERS), *key_names()]
        self.weights = torch.ones(self.first_code)
        self.weights[tokenizer.convert_tokens_to_ids(facts)] = FACT_WEIGHT
        self.start_average()

    def loss(self, model: Heard, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, guessed, scores = model(batch)
        labels = batch["labels"][:, 1:]
        answered = labels >= 0
        logits = model.planner.lm_head(hidden[:, :-1][answered]).float()
        losses = F.cross_entropy(logits, labels[answered], reduction="none")
        codes = labels[answered] >= self.first_code
        weights = self.weights.to(losses.device)[labels[answered][~codes]]
        words = (weights * losses[~codes]).sum() / weights.sum()
        labelled = batch["music_reading"].isfinite()
        read = mean((guessed - batch["music_reading"])[labelled].square())
        known = labelled[..., 0] & (labelled[..., 0].cumsum(1) > EAR)
        wanted = batch["music_reading"][known][:, TEMPI]
        tempo = mean(F.cross_entropy(scores[known], wanted, reduction="none"))
        numbers = {"words": words, "codes": mean(losses[codes]), "read": read, "tempo": tempo}
        # A plan is few words among many codes: both kinds weigh the same.
        loss = words + CODE_WEIGHT * numbers["codes"] + READ_WEIGHT * read + TEMPO_WEIGHT * tempo
        return loss, {name: value.detach() for name, value in numbers.items() if value}


def train_planner(
    run: Run, corpus: Corpus, held_out: Corpus, code_ids: tuple[np.ndarray, np.ndarray],
    tokenizer: PreTrainedTokenizerFast, sounds: Tensor, width: int = WIDTH, layers: int = LAYERS,
) -> Qwen3ForCausalLM:  # fmt: skip
    """Trains a planner whose codes begin as `sounds` (codes, width), see `sound_of_codes`.

    Where the run's folder holds a planner to begin from, all of it begins as that.
    """
    planner = build_planner(tokenizer, width, layers)
    first = tokenizer.convert_tokens_to_ids(code_token(0))
    planner.model.embed_tokens.weight.data[first : first + len(sounds)] = SPREAD * sounds
    if (run.folder / BEGINNING).exists():
        planner.load_state_dict(torch.load(run.folder / BEGINNING, weights_only=True))
    module = TrainedPlanner(run.steps, planner, tokenizer)
    train = DataLoader(
        Conversations(corpus, code_ids[0], tokenizer, run.batch, seed=11 + run.resumed()),
        batch_size=None,
    )
    turns = Conversations(held_out, code_ids[1], tokenizer, run.batch, seed=12)
    held = list(islice(turns, HELD_BATCHES))
    fit(module, train, DataLoader(held, batch_size=None), run)
    return module.average.module.planner


def load_planner(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "average.module.planner."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    table = weights["model.embed_tokens.weight"]
    layers = 1 + max(
        int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")
    )
    planner = build_planner(tokenizer, table.shape[1], layers)
    planner.load_state_dict(weights)
    return planner.eval()
