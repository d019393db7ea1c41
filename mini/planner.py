"""The 5Hz planner: a small Qwen3 that writes a plan and audio codes, or reads codes and tells.

Prompt formats and token names are those of the large model; ids and counts are read from the
tokenizer by whoever uses it.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mini.compose import FRAMES_PER_SECOND, Piece
from mini.latents import FRAMES, Corpus
from mini.model import WINDOW, heads
from mini.prompts import (
    END,
    NUMBERS,
    SECTION_TAGS,
    key_names,
    order_embeddings,
    sample_texts,
    train_bpe,
)
from mini.train_tokens import Codes
from mini.training import Run, Trained, fit, rank
from mini.words import caption, describe, lyrics

GENERATE = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"
NOTHING = "NO USER INPUT"
CODES_PER_SECOND = FRAMES_PER_SECOND // WINDOW
START, STOP, THINK, THOUGHT = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
FIELDS = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH, LAYERS = 192, 5


def code_token(code: int) -> str:
    return f"<|audio_code_{code}|>"


def planner_tokenizer(folder: Path, codes: int, pieces: int = 600) -> PreTrainedTokenizerFast:
    """The planner's tokenizer with `codes` audio codes: read from `folder` or made and written."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_bpe(sample_texts(pieces), 700, lowercase=False, special=[END, START, STOP])
    phrases = [f"# Instruction\n{text}\n\n" for text in (GENERATE, UNDERSTAND)]
    phrases += [
        "# Caption\n",
        "\n\n# Lyric\n",
        "# Lyric\n",
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


def plan_of(piece: Piece, seconds: int, rng: random.Random) -> dict[str, object]:
    return {
        "bpm": piece.bpm,
        "caption": describe(piece),
        "duration": seconds,
        "keyscale": piece.key,
        "language": "en" if piece.tagged else rng.choice(("en", "unknown")),
        "timesignature": piece.beats_per_bar,
    }


@torch.no_grad()
def encode_codes(codes: Codes, corpus: Corpus, folder: Path) -> np.ndarray:
    """Code ids (pieces, 5, n) of a corpus, at each of the five offsets of a code's window."""
    path = folder / "codes.npy"
    if path.exists() and len(known := np.load(path)) == len(corpus):
        return known
    count = FRAMES // WINDOW - 1
    ids = np.zeros((len(corpus), WINDOW, count), np.int16)
    for begin in range(0, len(corpus), 64):
        rows = range(begin, min(begin + 64, len(corpus)))
        latents = torch.from_numpy(
            np.stack([corpus.latents(row) for row in rows]).astype(np.float32)
        )
        for offset in range(WINDOW):
            window = latents[:, offset : offset + count * WINDOW]
            ids[begin : begin + 64, offset] = codes.encode(window)[1].numpy()
    np.save(path, ids)
    return ids


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

    def _planning(self, rng: random.Random) -> tuple[list[int], list[int], int]:
        """Prompt, answer and the gap of positions before the codes."""
        index = rng.randrange(len(self.corpus))
        piece = self.corpus.pieces[index]
        starts = range(0, FRAMES - 12 * FRAMES_PER_SECOND, 4 * piece.bar_frames)
        start = rng.choice(starts)
        fitting = (self.codes.shape[2] * WINDOW - start) // FRAMES_PER_SECOND
        seconds = rng.randint(10, 60)
        words, sung = (
            caption(piece, rng, mention=0.5),
            lyrics(piece, rng, start, seconds * FRAMES_PER_SECOND),
        )
        plan = plan_of(piece, seconds, rng)
        for field, chance in (("caption", 0.25), ("language", 0.2)):
            if rng.random() < chance:
                del plan[field]
        prompt = generate_prompt(words, sung or "[Instrumental]")
        if rng.random() < 0.08:
            prompt, plan = chat(GENERATE, NOTHING), {}
        elif rng.random() < 0.04:
            prompt = chat(GENERATE, f"# Lyric\n{sung or '[Instrumental]'}\n")
        prompt_ids, thought = self._ids(prompt), self._ids(think(plan))
        music = self._codes(index, start, min(seconds, fitting) * CODES_PER_SECOND)
        whole = seconds <= fitting
        gap = 0 if whole else rng.randint(0, (seconds - fitting) * CODES_PER_SECOND)
        self._gap_at = len(prompt_ids) + len(thought)
        if not plan:  # an empty thought is given, not asked for
            return prompt_ids + thought, music + [self.stop] * whole, gap
        return prompt_ids, thought + music + [self.stop] * whole, gap

    def _listening(self, rng: random.Random) -> tuple[list[int], list[int], int]:
        index = rng.randrange(len(self.corpus))
        piece = self.corpus.pieces[index]
        start = rng.randrange(0, FRAMES - 10 * FRAMES_PER_SECOND - WINDOW)
        fitting = (self.codes.shape[2] * WINDOW - start) // FRAMES_PER_SECOND
        seconds = rng.randint(6, max(6, fitting))
        music = self._codes(index, start, seconds * CODES_PER_SECOND)
        head, tail = chat(UNDERSTAND, "\0").split("\0")
        sung = lyrics(piece, rng, start, seconds * FRAMES_PER_SECOND) or "[Instrumental]"
        self._gap_at = 0
        answer = [*self._ids(think(plan_of(piece, seconds, rng)) + sung), self.stop]
        return self._ids(head) + music + self._ids(tail), answer, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            rows = []
            for _ in range(self.batch):
                prompt, answer, gap = (self._listening if rng.random() < 0.4 else self._planning)(
                    rng
                )
                rows.append((prompt, answer, self._gap_at, gap))
            length = -(-max(len(p) + len(a) for p, a, _, _ in rows) // 32) * 32
            ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
            labels = torch.full((len(rows), length), -100)
            positions = torch.arange(length).repeat(len(rows), 1)
            for row, (prompt, answer, gap_at, gap) in enumerate(rows):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor(prompt + answer)
                labels[row, len(prompt) : end] = torch.tensor(answer)
                if gap:
                    positions[row, gap_at:] += gap
            yield {"ids": ids, "labels": labels, "positions": positions}


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
    order_embeddings(planner.model.embed_tokens.weight.data, tokenizer, scale=0.05)
    return planner


class TrainedPlanner(Trained):
    """Next-token loss over the answers; codes and words are logged apart."""

    def __init__(self, steps: int, planner: nn.Module, first_code: int, rate: float = 1.5e-3):
        super().__init__(steps, rate, warmup=100, decay=0.02, average=0.995)
        self.model, self.first_code = planner, first_code
        self.start_average()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.model(
            input_ids=batch["ids"], position_ids=batch["positions"]
        ).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        asked = labels >= 0
        logits = model.lm_head(hidden[asked]).float()
        losses = F.cross_entropy(logits, labels[asked], reduction="none")
        codes = labels[asked] >= self.first_code
        # A plan is few words among many codes: both kinds weigh the same.
        words_loss, codes_loss = losses[~codes].mean(), losses[codes].mean()
        return words_loss + codes_loss, {"words": words_loss.detach(), "codes": codes_loss.detach()}


def train_planner(
    run: Run, corpus: Corpus, held_out: Corpus, code_ids: tuple[np.ndarray, np.ndarray],
    tokenizer: PreTrainedTokenizerFast, width: int = WIDTH, layers: int = LAYERS,
) -> Qwen3ForCausalLM:  # fmt: skip
    planner = build_planner(tokenizer, width, layers)
    module = TrainedPlanner(run.steps, planner, tokenizer.convert_tokens_to_ids(code_token(0)))
    train = DataLoader(
        Conversations(corpus, code_ids[0], tokenizer, run.batch, seed=11), batch_size=None
    )
    held = [next(iter(Conversations(held_out, code_ids[1], tokenizer, 48, seed=12)))]
    fit(module, train, DataLoader(held, batch_size=None), run)
    return module.average.module


def load_planner(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "average.module."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    table = weights["model.embed_tokens.weight"]
    layers = 1 + max(
        int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")
    )
    planner = build_planner(tokenizer, table.shape[1], layers)
    planner.load_state_dict(weights)
    return planner.eval()
