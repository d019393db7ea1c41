"""Trains text encoder, condition encoder and DiT together by flow matching.

One batch mixes the tasks of the studio: text-to-music, repaint with random masks, cover from
codes, a timbre reference, and the null condition that guidance subtracts.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from mini.attention import use_grouped_attention
from mini.captions import bpm_near, caption, lyrics, spell
from mini.dataset import Corpus, Crop
from mini.model import Generator, Sizes, reading
from mini.prompts import lyric_prompt, text_prompt
from mini.resume import begin_generator
from mini.train_tokens import Codes
from mini.training import Run, Trained, fit, rank
from mini.vae import LATENTS

LENGTHS = (160, 160, 320, 400)  # latent frames of a batch; a long one has fewer crops
REFERENCE_FRAMES, REFERENCES = 250, 1  # a batch carries one timbre reference
REPAINT, COVER, NULL = 0.4, 0.08, 0.1  # chances of the tasks
ALIGNED = 0.4  # of repaints and covers begin with the chord loop
TIME_SHIFT = 2.5  # pushes training times towards noise: there tempo, key and form are decided
KEPT_WEIGHT = 0.2  # of the loss where repaint keeps the source
READ_WEIGHT = 1.0  # of the reader's error


@dataclass
class Batch:
    """What one step needs; frames T, batch B."""

    target: Tensor  # (B, T, 64)
    context: Tensor  # (B, T, 128): source latents and chunk mask
    text: dict[str, Tensor]
    lyric: dict[str, Tensor]
    references: Tensor  # (R, 250, 64), of the first R of the batch
    null: Tensor  # (B,) bool: the condition is dropped
    weight: Tensor  # (B, T, 1) of the loss
    reading: Tensor  # (B, T / 2, READ): what the words mean


def repaint_span(frames: int, rng: random.Random) -> tuple[int, int]:
    """First and last frame of a region to paint: often the end or the start of the sound."""
    chance, edge = rng.random(), rng.randint(frames // 8, frames - frames // 8)
    if chance < 0.4:
        return edge, frames
    if chance < 0.5:
        return 0, edge
    width = rng.randint(frames // 6, frames * 3 // 4)
    start = rng.randint(0, frames - width)
    return start, start + width


class Tasks(IterableDataset):
    """Endless batches of mixed tasks over a corpus."""

    def __init__(
        self, corpus: Corpus, codes: Codes, tokenizer: PreTrainedTokenizerFast, silence: Tensor, seed: int,
        batch: int, lengths: tuple[int, ...] = LENGTHS, only: str | None = None,
    ):  # fmt: skip
        self.corpus, self.codes, self.tokenizer, self.silence = corpus, codes, tokenizer, silence
        self.seed, self.batch, self.lengths, self.only = seed, batch, lengths, only

    def _task(self, rng: random.Random) -> str:
        if self.only:
            return self.only
        chance = rng.random()
        return (
            "repaint" if chance < REPAINT else "cover" if chance < REPAINT + COVER else "text2music"
        )

    def _context(self, crop: Crop, task: str, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Source latents (T, 64) and chunk mask (T, 64), 1 where the model is to paint."""
        frames = len(crop.latents)
        silence, mask = self.silence[:frames], torch.ones(frames, LATENTS)
        if task == "cover":
            return self.codes.hint(crop.latents[None])[0], mask
        if task == "repaint":
            start, end = repaint_span(frames, rng)
            mask = torch.zeros(frames, LATENTS)
            mask[start:end] = 1
            return torch.where(mask > 0, silence, crop.latents), mask
        return silence, mask

    def _words(self, crop: Crop, task: str, referred: bool, rng: random.Random) -> tuple[str, str]:
        piece = crop.piece

        def shown(value: object, chance: float = 0.88) -> object:
            return value if rng.random() < chance else None

        words = "" if referred and rng.random() < 0.5 else caption(piece, rng)
        bpm = bpm_near(piece, rng) if rng.random() < 0.25 else piece.bpm
        metre = shown(str(piece.beats_per_bar))
        seconds = crop.seconds if rng.random() < 0.7 else rng.randint(5, 60)
        text = text_prompt(words, task, shown(bpm), shown(spell(piece.key, rng)), metre, seconds)
        sung = lyrics(piece, rng, crop.start, len(crop.latents))
        return text, lyric_prompt(sung, rng.choice(("en", "en", "unknown")))

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            frames = rng.choice(self.lengths)
            count = max(2, self.batch * min(self.lengths) // frames)
            targets, contexts, texts, sung, weights = [], [], [], [], []
            references, readings = [], []
            for index in range(count):
                task = self._task(rng)
                referred = index < REFERENCES and self.only is None
                crop = self.corpus.crop(
                    frames, rng, aligned=task == "text2music" or rng.random() < ALIGNED
                )
                source, mask = self._context(crop, task, rng)
                text, lyric = self._words(crop, task, referred, rng)
                if referred:
                    other = self.corpus.crop(REFERENCE_FRAMES, rng, aligned=False)
                    same = self.corpus.cut(crop.index, other.start, REFERENCE_FRAMES)
                    references.append(same.latents)
                targets.append(crop.latents)
                contexts.append(torch.cat([source, mask], dim=-1))
                texts.append(text)
                sung.append(lyric)
                readings.append(reading(crop.piece, crop.start, frames, step=2))
                weights.append(KEPT_WEIGHT + (1 - KEPT_WEIGHT) * mask[:, :1])
            tokens = {"padding": "longest", "return_tensors": "pt", "truncation": True}
            yield Batch(
                target=torch.stack(targets),
                context=torch.stack(contexts),
                text=dict(self.tokenizer(texts, max_length=256, **tokens)),
                lyric=dict(self.tokenizer(sung, max_length=512, **tokens)),
                references=torch.stack(references)
                if references
                else torch.zeros(0, REFERENCE_FRAMES, LATENTS),
                null=torch.tensor([rng.random() < NULL for _ in range(count)]),
                weight=torch.stack(weights),
                reading=torch.stack(readings),
            )


class TrainedGenerator(Trained):
    """Velocity error, noise minus data; more of the times near noise, where form is decided."""

    def __init__(
        self, steps: int, tokenizer: PreTrainedTokenizerFast, sizes: Sizes, silence: Tensor,
        rate: float = 1e-3,
    ):  # fmt: skip
        super().__init__(steps, rate, warmup=150, decay=0.01, average=0.997)
        self.model = Generator(tokenizer, sizes, silence)
        use_grouped_attention(self.model.condition_encoder)
        use_grouped_attention(self.model.transformer)
        self.start_average()
        self.silent: Tensor | None = None

    def _timbre(self, model: Generator, batch: Batch) -> Tensor:
        """(B, 1, width): the references' timbre, and silence's for all others."""
        if self.silent is None or not self.training or self.global_step % 25 == 0:
            self.silent = model.silent_timbre()
        silent = self.silent.float()
        count, referenced = len(batch.target), len(batch.references)
        if not referenced:
            return silent.expand(count, -1, -1)
        order = torch.arange(referenced, device=silent.device)
        timbre = model.condition_encoder.timbre_encoder(batch.references, order)[0].float()
        return torch.cat([timbre, silent.expand(count - referenced, -1, -1)])

    def _velocity_error(
        self, model: Generator, batch: Batch, time: Tensor, noise: Tensor, null: Tensor
    ) -> Tensor:
        """Squared error (B, T, 64)."""
        conditions = model.conditions(batch.text, batch.lyric, self._timbre(model, batch))
        empty = model.condition_encoder.null_condition_emb.to(conditions.dtype)
        conditions = torch.where(null[:, None, None], empty, conditions)
        at = time[:, None, None]
        noisy = (1 - at) * batch.target + at * noise
        made = model.velocity(noisy, time, conditions, batch.context)
        return (made - (noise - batch.target)).square()

    def loss(self, model: Generator, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(batch.target)
        time = torch.where(
            torch.rand(count) < 0.25,
            torch.rand(count),
            torch.sigmoid(1.1 * torch.randn(count) + 0.4),
        )
        time = (
            (TIME_SHIFT * time / (1 + (TIME_SHIFT - 1) * time))
            .clamp(1e-3, 1)
            .to(batch.target.device)
        )
        error = self._velocity_error(model, batch, time, torch.randn_like(batch.target), batch.null)
        velocity = (error * batch.weight).sum() / (batch.weight.sum() * LATENTS)
        conditioned = ~batch.null
        read = (model.read() - batch.reading)[conditioned].square().mean()
        return velocity + READ_WEIGHT * read, {"velocity": velocity.detach(), "read": read.detach()}

    def validation_step(self, batch: Batch, _: int) -> None:
        """Held-out text-to-music error at fixed times, with the condition and without."""
        model = self.average.module
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(batch.target.shape, generator=generator).to(batch.target.device)
        self.silent = None
        for value in (0.5, 0.8, 0.95):
            time = torch.full((len(noise),), value, device=noise.device)
            for name, null in (("velocity", False), ("null", True)):
                dropped = torch.full_like(batch.null, null)
                error = self._velocity_error(model, batch, time, noise, dropped).mean()
                self.log(f"held_{name}_{value}", error, batch_size=1)
        self.silent = None

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _: int) -> Batch:
        def moved(value: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
            return (
                {k: v.to(device) for k, v in value.items()}
                if isinstance(value, dict)
                else value.to(device)
            )

        return Batch(**{name: moved(value) for name, value in vars(batch).items()})


def train_generator(
    run: Run, corpus: Corpus, held_out: Corpus, codes: Codes, tokenizer: PreTrainedTokenizerFast,
    silence: Tensor, sizes: Sizes, lengths: tuple[int, ...] = LENGTHS,
) -> Generator:  # fmt: skip
    module = TrainedGenerator(run.steps, tokenizer, sizes, silence)
    begin_generator(module.model, run.folder)
    module.start_average()
    frames = silence[0]
    train = Tasks(corpus, codes, tokenizer, frames, 7 + run.resumed(), run.batch, lengths)
    held = Tasks(held_out, codes, tokenizer, frames, 8, run.batch, lengths[:1], "text2music")
    loaders = (
        DataLoader(train, batch_size=None),
        DataLoader([next(iter(held))], batch_size=None, collate_fn=lambda b: b),
    )
    fit(module, *loaders, run, check_every=500)
    return module.average.module


def load_generator(
    folder: Path, tokenizer: PreTrainedTokenizerFast, sizes: Sizes, silence: Tensor
) -> Generator:
    """The averaged generator of a run's last checkpoint, with the stock attention."""
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    generator, prefix = Generator(tokenizer, sizes, silence), "average.module."
    generator.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return generator.eval()
