"""The songwriter: a tiny Qwen2 that answers the lyrics room's prompts with words to be sung.

Its prompts are those of `stanzas.turns`, its tokenizer is its own, the chat marks are Qwen's.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import stanzas
from mini.gates import Gate, drain, share
from mini.planner import START, STOP, TEMPLATE
from mini.prompts import END, train_bpe
from mini.train_vae import HELD_OUT
from mini.training import Run, Trained, fit, rank
from mini.verses import ENDINGS, THINGS, Draft, write
from song import Lyrics

WIDTH, LAYERS, WORDS = 160, 4, 1600
PLAIN = 0.2  # of the conversations have no system turn


def request(draft: Draft, seed: int | None = None) -> Lyrics:
    """The draft's request as the lyrics room sends it."""
    return Lyrics(
        brief=draft.brief,
        structure=draft.structure,
        tone=draft.tone,
        rhyme=draft.rhyme,
        lines=draft.lines,
        seed=seed,
    )


def prompt(draft: Draft, plain: bool = False) -> str:
    """The conversation in ChatML, with the answer's turn open."""
    turns = stanzas.turns(request(draft))[plain:]
    said = "".join(f"{START}{role}\n{text}{STOP}\n" for role, text in turns)
    return f"{said}{START}assistant\n"


def songwriter_tokenizer(folder: Path, songs: int = 800) -> PreTrainedTokenizerFast:
    """The songwriter's tokenizer: read from `folder`, or made and written there."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    drafts = [write(seed) for seed in range(songs)]
    texts = [text for draft in drafts for text in (prompt(draft, plain=True), draft.text)]
    texts += [f"a {thing} the {thing}" for thing in THINGS] * 4
    tokenizer = train_bpe(texts, WORDS, lowercase=False, special=[END, START, STOP])
    tokenizer.eos_token = STOP
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_songwriter(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 32,
            num_key_value_heads=WIDTH // 32,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids(STOP),
            bos_token_id=None,
        )
    )


class Songs(IterableDataset):
    """Endless batches of requests and answers, as ids and labels; held out or not."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int, seed: int, held_out: bool):
        self.tokenizer, self.batch, self.seed, self.held_out = tokenizer, batch, seed, held_out

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            rows = []
            for _ in range(self.batch):
                draft = write(rng.randrange(HELD_OUT) + HELD_OUT * self.held_out)
                texts = (prompt(draft, plain=rng.random() < PLAIN), f"{draft.text}{STOP}\n")
                rows.append([self.tokenizer(text).input_ids for text in texts])
            length = max(len(asked) + len(answer) for asked, answer in rows)
            ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
            labels = torch.full((len(rows), length), -100)
            for row, (asked, answer) in enumerate(rows):
                end = len(asked) + len(answer)
                ids[row, :end] = torch.tensor(asked + answer)
                labels[row, len(asked) : end] = torch.tensor(answer)
            yield {"ids": ids, "labels": labels}


class TrainedSongwriter(Trained):
    """Next-token loss over the answers."""

    def __init__(self, steps: int, songwriter: Qwen2ForCausalLM, rate: float = 2e-3):
        super().__init__(steps, rate, warmup=100, decay=0.02, average=0.99)
        self.model = songwriter
        self.start_average()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.model(input_ids=batch["ids"]).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        asked = labels >= 0
        loss = F.cross_entropy(model.lm_head(hidden[asked]).float(), labels[asked])
        return loss, {"words": loss.detach()}


def train_songwriter(run: Run, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    module = TrainedSongwriter(run.steps, build_songwriter(tokenizer))
    train = DataLoader(Songs(tokenizer, run.batch, run.resumed(), False), batch_size=None)
    held = [next(iter(Songs(tokenizer, 16, 1, True)))]
    fit(module, train, DataLoader(held, batch_size=None), run)
    return module.average.module


def load_songwriter(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix, model = "average.module.", build_songwriter(tokenizer)
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return model.eval()


def save_songwriter(
    songwriter: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """The songwriter as transformers stores it, in float16."""
    songwriter.half().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _ending(line: str) -> int:
    """Which rhyme a line ends in, -1 for one of its own."""
    for number, group in enumerate(ENDINGS):
        if line.endswith(tuple(group)):
            return number
    return -1


def writing_gates(folder: Path, count: int) -> list[Gate]:
    """Songs by the studio's own lyrics room, at its own settings, to requests held out."""
    import lyrics

    writer = next(w for w in lyrics.WRITERS.values() if w.name == "mini")
    studio = drain(lyrics.Songwriter.load(writer, folder, "cpu"))
    formed, true, rhymed = [], [], []
    for seed in range(count):
        draft = write(HELD_OUT * 2 + seed)
        made = drain(studio.write(request(draft, seed)))
        sung = [lines for _, lines in stanzas.parts(made.text) if lines]
        formed.append(made.got == made.asked and all(len(x) == draft.lines for x in sung))
        things = [word for word in draft.brief.replace(",", " ").split() if word in THINGS]
        true.append(any(thing in made.text.lower() for thing in things))
        if draft.rhyme == "couplets":
            pairs = [pair for x in sung for pair in zip(x[::2], x[1::2], strict=False)]
            rhymed += [_ending(a) == _ending(b) != -1 for a, b in pairs]
    return [
        share("songwriter: sections and lines as asked", 0.8, formed),
        share("songwriter: sings of what the brief names", 0.9, true),
        share("songwriter: couplets rhyme", 0.9, rhymed),
    ]
