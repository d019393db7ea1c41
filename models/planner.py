"""The 5Hz language model: writes a plan and audio codes, or listens to codes and tells.

Any ACE-Step planner in the original layout, on plain transformers. Everything long is a generator
that yields `Progress` and returns its result; what the model may say is decided in `grammar`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.requests import INSTRUMENTAL
from core.results import Progress
from models import plan_grammar, qwen3
from models.plan_grammar import Plan, Thought, Words

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM


PULSE_S = 0.1
"""Seconds between two signs of life, at least: a token may take a millisecond."""


PIECE = 256
"""Tokens of a prompt that are read at a time: on a CPU a large planner takes a minute for all."""


FEW = 4096
"""Up to this many legal tokens, only their rows of the vocabulary are computed."""


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen: most likely at `temperature` 0, otherwise among the `top_k` likeliest
    (0: all) that hold the share `top_p` (1: all) of what is left."""

    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, song: Any) -> SamplingParams:
        """The dice of a request's planner knobs."""
        return cls(song.lm_temperature, song.lm_top_p, song.lm_top_k)


def pick(logits: torch.Tensor, draw: torch.Tensor, dice: SamplingParams) -> torch.Tensor:
    """The index that `draw` falls on, as a tensor without axes on the device of `logits`.

    Args:
        logits: float32 [n], guided and masked already.
        draw: uniform in [0, 1), without axes. Drawn beforehand, so that a seed means the same on
            every device and nothing waits for the host.

    The order is the authors' PyTorch backend's: top-k, top-p at temperature 1, then temperature.
    """
    import torch

    if dice.temperature <= 0:
        return logits.argmax()
    if dice.top_k > 0:
        values, order = logits.topk(min(dice.top_k, len(logits)))
    elif dice.top_p < 1:
        values, order = logits.sort(descending=True)
    else:
        values, order = logits, None
    if dice.top_p < 1:
        shares = values.softmax(0)
        before = _summed(shares) - shares
        values = values.masked_fill(before > dice.top_p, -torch.inf)
    heights = _summed((values / dice.temperature).softmax(0))
    # The first place where the sum exceeds the draw. A draw is below 1 by more than the product
    # rounds, so that is never a place of share 0.
    at = (heights <= draw * heights[-1]).sum()
    return at if order is None else order[at]


def _summed(shares: torch.Tensor) -> torch.Tensor:
    """Running sums, in float64 where the device has it: a GPU adds in no fixed order, and must not
    come to another token by that."""
    import torch

    return shares.cumsum(0, dtype=torch.float32 if shares.device.type == "mps" else torch.float64)


class Planner:
    """One loaded planner on one device. Not thread-safe: one piece at a time."""

    def __init__(self, model: Qwen3ForCausalLM, words: Words, device: str) -> None:
        self.model = model
        self.qwen = qwen3.Qwen(model)
        self.words = words
        self.device = device
        self._sets: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}
        self.table = model.get_output_embeddings().weight.detach()
        self.codes = self.table[words.first_code : words.first_code + words.codebook]

    @classmethod
    def load(cls, folder: Path, codebook: int, device: str, dtype: str) -> Iterator[Progress]:
        """Load the planner in `folder`, and prove that it is whole.

        Args:
            codebook: number of codes of the music model's quantiser; no other code is ever said.
            device: "cpu", "cuda" or "mps".
            dtype: "float32" or "bfloat16". The authors use float32 on CPUs and Apple's GPUs.

        Returns:
            The planner (as the generator's return value).

        Raises:
            StudioError: `model-broken`, `model-mismatch`.
        """
        import torch
        from safetensors import SafetensorError
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        yield Progress(stage="Loading the planner", step=0, steps=2)
        for file in ("config.json", "tokenizer.json"):
            if not (folder / file).is_file():
                raise _broken(folder, file, "is missing")
        try:  # tokenizers raises nothing narrower than Exception
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise _broken(folder, "tokenizer.json", "cannot be read") from error
        try:
            words = Words(tokenizer, codebook)
        except ValueError as error:
            raise _broken(folder, "tokenizer.json", str(error)) from error
        yield Progress(stage="Loading the planner", step=1, steps=2)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type != "qwen3" or not qwen3.reads(config):
                raise _broken(folder, "config.json", "is not that of a planner")
            model, said = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            problem = f"does not load ({type(error).__name__})"
            raise _broken(folder, "model.safetensors", problem) from error
        _prove_whole(folder, model, said, words)
        model.eval().requires_grad_(False).to(device)
        yield Progress(stage="Loading the planner", step=2, steps=2)
        return cls(model, words, device)

    def plan(
        self,
        caption: str,
        lyrics: str,
        wanted: Collection[str],
        given: Mapping[str, Any],
        dice: SamplingParams,
        seed: int,
        longest_s: int = plan_grammar.LONGEST_S,
    ) -> Iterator[Progress]:
        """Find the `wanted` fields of a piece. `given` ones stay, and lead the others.

        Without guidance: the authors' default distorts the caption's words, and the state machine
        leaves it little to decide elsewhere. Where nothing is left to find nothing is computed.

        Returns:
            A `Plan` (as the generator's return value).

        Raises:
            StudioError: `lyrics-too-long`.
        """
        if set(wanted) <= set(given):
            return Plan.of(given)
        thought = Thought(self.words, wanted, given, longest_s)
        prompt = plan_grammar.plan_prompt(caption, lyrics)
        plan, _ = yield from self._write("Planning", prompt, thought, dice, seed, lyrics)
        return plan

    def compose(
        self,
        caption: str,
        lyrics: str,
        plan: Plan,
        duration_s: float,
        dice: SamplingParams,
        seeds: Sequence[int],
        guidance: float = 1.0,
        negative: str = "",
    ) -> Iterator[Progress]:
        """Write audio codes for a piece, exactly five a second, once for each seed.

        Only codes of the quantiser are computed: as the number is known, the end is never chosen.

        Args:
            guidance: above 1 away from `negative`, or from a piece nobody asked for.

        Returns:
            For each seed a list of int(5 * duration_s) codes, the same whether made alone or not
            (as the generator's return value).

        Raises:
            StudioError: `lyrics-too-long`.
        """
        import torch

        texts = [self.words.ids(plan_grammar.codes_prompt(caption, lyrics, plan))]
        if guidance > 1:
            texts.append(self.words.ids(plan_grammar.plain_prompt(negative)))
        count = int(duration_s * plan_grammar.CODE_RATE)
        total = count * len(seeds)
        track = self._track(texts, count, lyrics)
        start = yield from _begin(track, "Composing codes", total)
        told = time.monotonic()
        length, pieces = track.length, []
        for seed in seeds:
            hidden, track.length = start, length
            draws = self._draws(seed, count)
            codes = torch.empty(count, dtype=torch.long, device=self.device)
            for i in range(count):
                code = self._code(hidden, guidance, draws[i], dice)
                codes[i] = code
                if i + 1 < count:
                    hidden = track.read((code + self.words.first_code).expand(len(texts), 1))
                if time.monotonic() - told > PULSE_S:
                    # Waits for the device, so that what is told has been done.
                    _, told = codes[i].item(), time.monotonic()
                    yield Progress(
                        stage="Composing codes", step=len(pieces) * count + i + 1, steps=total
                    )
            pieces.append(codes.tolist())
        yield Progress(stage="Composing codes", step=total, steps=total)
        return pieces

    def understand(
        self,
        codes: Sequence[int],
        dice: SamplingParams,
        seed: int,
        lyrics: bool = True,
        wanted: Collection[str] = plan_grammar.FIELDS,
    ) -> Iterator[Progress]:
        """Listen to a piece: tempo, key, metre, language, length and a caption.

        Args:
            codes: of the source, five a second; of what is longer than the model can count (the
                embedded one 580 s, the large ones two hours) the beginning is heard.
            lyrics: also write down the words, which takes much longer.
            wanted: the fields to tell; a caption takes most of the time.

        Returns:
            (`Plan`, lyrics as heard or "") (as the generator's return value).

        Raises:
            ValueError: a code outside the quantiser.
        """
        if not all(0 <= code < self.words.codebook for code in codes):
            raise ValueError(f"codes run from 0 to {self.words.codebook - 1}")
        room = plan_grammar.LYRIC_TOKENS if lyrics else 0
        thought = Thought(self.words, wanted, {}, lyrics=room)
        fitting = self.model.config.max_position_embeddings - 2 * plan_grammar.CAPTION_TOKENS - 160
        prompt = plan_grammar.understand_prompt(codes[: max(0, fitting)])
        return (yield from self._write("Listening", prompt, thought, dice, seed))

    def inspire(
        self,
        query: str,
        instrumental: bool,
        dice: SamplingParams,
        seed: int,
        language: str = "unknown",
        longest_s: int = plan_grammar.LONGEST_S,
    ) -> Iterator[Progress]:
        """Make a whole song's plan and lyrics of one idea, or of none.

        Returns:
            (`Plan`, lyrics) (as the generator's return value).
        """
        given = {"language": language} if language != "unknown" else {}
        thought = Thought(
            self.words, plan_grammar.FIELDS, given, longest_s, plan_grammar.LYRIC_TOKENS
        )
        prompt = plan_grammar.inspire_prompt(query, instrumental)
        plan, lyrics = yield from self._write("Thinking of a song", prompt, thought, dice, seed)
        return plan, (INSTRUMENTAL if instrumental and not lyrics else lyrics)

    def rewrite(
        self,
        caption: str,
        lyrics: str,
        given: Mapping[str, Any],
        dice: SamplingParams,
        seed: int,
        longest_s: int = plan_grammar.LONGEST_S,
    ) -> Iterator[Progress]:
        """Bring style and lyrics into the form the model likes: fuller words, marked sections.

        Returns:
            (`Plan`, lyrics) (as the generator's return value).

        Raises:
            StudioError: `lyrics-too-long`.
        """
        thought = Thought(
            self.words, plan_grammar.FIELDS, given, longest_s, plan_grammar.LYRIC_TOKENS
        )
        prompt = plan_grammar.rewrite_prompt(caption, lyrics)
        return (yield from self._write("Rewriting", prompt, thought, dice, seed, lyrics))

    def _write(
        self,
        stage: str,
        prompt: str,
        thought: Thought,
        dice: SamplingParams,
        seed: int,
        lyrics: str = "",
    ) -> Iterator[Progress]:
        """Let the model fill a thought. Steps are fields; one more stands for free text.

        Forced text is read in one piece with the token before it. Where the prompt is long, free
        text gets what is left of the places that the model can count.
        """
        import torch

        ids, room = self.words.ids(prompt), 2 * plan_grammar.CAPTION_TOKENS
        spare = self.model.config.max_position_embeddings - len(ids) - room
        thought.lyrics = max(0, min(thought.lyrics, spare))
        room += thought.lyrics
        steps = len(thought.fields) + bool(thought.lyrics)
        track, asks = self._track([ids], room, lyrics), thought.asks()
        hidden = yield from _begin(track, stage, steps)
        draws = self._draws(seed, room)
        read, told, chosen = 0, time.monotonic(), None
        for draw in draws:
            try:
                ask = asks.send(chosen)
            except StopIteration:
                break
            new = thought.tokens[read:]
            read += len(new)
            hidden = track.read(torch.tensor([new], device=self.device)) if new else hidden
            chosen = self._token(hidden[0], ask, draw, dice)
            if time.monotonic() - told > PULSE_S:
                told = time.monotonic()
                yield Progress(stage=stage, step=thought.done, steps=steps)
        yield Progress(stage=stage, step=steps, steps=steps)
        said = thought.text()
        return plan_grammar.parse(said), plan_grammar.parse_lyrics(said)

    def _token(
        self, hidden: torch.Tensor, ask: plan_grammar.Ask, draw: torch.Tensor, dice: SamplingParams
    ) -> int:
        """One of the legal tokens, from the hidden state [width]."""
        import torch

        with torch.inference_mode():
            if len(ask.legal) <= FEW:
                few = torch.tensor(ask.legal, device=self.device)
                logits = torch.nn.functional.linear(hidden, self.table[few])
            else:
                logits = torch.nn.functional.linear(hidden, self.table)[self._many(ask.legal)]
            sure = SamplingParams(0, 1, 0) if ask.greedy else dice
            return ask.legal[int(pick(logits.float(), draw, sure))]

    def _many(self, legal: tuple[int, ...]) -> torch.Tensor:
        """The ids of a large set on the device. There are a handful, each one object for good."""
        import torch

        if id(legal) not in self._sets:
            self._sets[id(legal)] = (legal, torch.tensor(legal, device=self.device))
        return self._sets[id(legal)][1]

    def _code(
        self, hidden: torch.Tensor, guidance: float, draw: torch.Tensor, dice: SamplingParams
    ) -> torch.Tensor:
        """One code, from the hidden states [1 or 2, width]."""
        import torch

        with torch.inference_mode():
            logits = torch.nn.functional.linear(hidden, self.codes).float()
            if len(logits) == 2:
                cond, plain = logits
                return pick(plain + guidance * (cond - plain), draw, dice)
            return pick(logits[0], draw, dice)

    def _track(self, texts: Sequence[Sequence[int]], more: int, lyrics: str) -> qwen3.KeyValueCache:
        """Room for the prompts and what follows, if the model can count that far."""
        limit = self.model.config.max_position_embeddings
        tokens = max(map(len, texts)) + more
        if tokens > limit:
            words = len(lyrics.split()) * max(0, limit - more) / max(map(len, texts))
            raise StudioError("lyrics-too-long", tokens=tokens, limit=limit, words=int(0.8 * words))
        return qwen3.KeyValueCache(self.qwen, texts, more)

    def _draws(self, seed: int, count: int) -> torch.Tensor:
        """Uniform draws, float32 [count]: from the CPU, the same on every device."""
        import torch

        draws = torch.rand(count, generator=torch.Generator("cpu").manual_seed(seed))
        return draws.to(self.device)


def _begin(track: qwen3.KeyValueCache, stage: str, steps: int) -> Iterator[Progress]:
    """Read the prompts piece by piece, and return the hidden states behind them."""
    hidden = None
    for piece in track.texts.split(PIECE, 1):
        yield Progress(stage=stage, step=0, steps=steps)
        hidden = track.read(piece)
    return hidden


def _prove_whole(
    folder: Path, model: Qwen3ForCausalLM, said: Mapping[str, Any], words: Words
) -> None:
    """Refuse a planner with tensors missing, surplus, not finite, or fewer rows than words."""
    import torch

    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if lacking := sorted(set(said["missing_keys"]) - tied):
        raise _broken(folder, "model.safetensors", f"lacks the tensor {lacking[0]}")
    if wrong := sorted(map(str, [*said["mismatched_keys"], *said["unexpected_keys"]])):
        raise _broken(folder, "model.safetensors", f"holds {wrong[0]}, which does not belong there")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise _broken(folder, "model.safetensors", f"has no finite numbers in {name}")
    if words.size > model.config.vocab_size:
        raise StudioError(
            "model-mismatch",
            model=folder.name,
            problem=f"{words.size} words for {model.config.vocab_size} embeddings",
            fix=f"Put a whole copy of the planner into {folder.name}",
        )


def _broken(folder: Path, file: str, problem: str) -> StudioError:
    fix = f"Put a whole copy of the planner into {folder.name}"
    return StudioError("model-broken", model=folder.name, file=file, problem=problem, fix=fix)
