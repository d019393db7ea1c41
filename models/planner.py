"""The 5 Hz language model: writes a plan and audio codes for a song, or describes given codes.

Any ACE-Step planner in its original layout, on plain transformers. Everything long is a generator
that yields `Progress` and returns its result; what the model may write is in `plan_grammar`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.music import INSTRUMENTAL
from core.requests import EDITION
from core.results import Progress
from core.text import describe_length
from models import plan_format, plan_grammar, qwen3
from models.code_decoder import code_decoder
from models.cuda_graph import compiling
from models.loading import load_errors, load_transformers
from models.plan_format import FIELDS, Plan
from models.plan_grammar import PlanConstraint, TokenChoice, Vocabulary
from models.token_sampling import GREEDY, SamplingParams, sample_token, uniform_draws

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM


PROGRESS_INTERVAL_S = 0.1
"""Seconds between two progress events, at least: a token may take a millisecond."""


PROMPT_CHUNK = 256
"""Tokens of a prompt read at a time: on a CPU a large planner takes a minute for all of them."""


OTHER_FIELD_TOKENS = 512
"""Room for the names of all fields, and for all values but the caption and the genres."""


FEW_TOKENS = 4096
"""Up to this many legal tokens, only their logits are computed."""


class Planner:
    """One loaded planner on one device. Not thread-safe: one song at a time.

    Args:
        fields: those of a plan that the model was trained to write. A planner whose config.json
            has no `plan_fields` writes all of them.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        vocabulary: Vocabulary,
        device: str,
        fields: Collection[str] = FIELDS,
    ) -> None:
        self.model = model
        self.qwen = qwen3.Qwen3(model)
        self.vocabulary = vocabulary
        self.device = device
        self.fields = frozenset(fields)
        self.context_length: int = model.config.max_position_embeddings
        self.output_head = model.get_output_embeddings().weight.detach()
        first = vocabulary.first_code
        self.code_head = self.output_head[first : first + vocabulary.codebook]
        self._legal_ids: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}

    @classmethod
    def load(
        cls, folder: Path, codebook: int, device: str, dtype: str
    ) -> Generator[Progress, None, Planner]:
        """Load the planner in `folder`, and check that it is complete.

        Args:
            codebook: number of codes of the music model's quantiser; no other code is written.
            device: "cpu", "cuda" or "mps".
            dtype: "float32" or "bfloat16". The authors use float32 on CPUs and Apple's GPUs.

        Raises:
            StudioError: `model-broken`, `model-mismatch`.
        """
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModelForCausalLM

        fail = partial(_broken, folder)
        yield Progress(stage="Loading the planner", step=0, steps=2)
        for file in ("config.json", "tokenizer.json"):
            if not (folder / file).is_file():
                raise _broken(folder, file, "is missing")
        try:  # tokenizers raises nothing narrower than Exception
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise _broken(folder, "tokenizer.json", "cannot be read") from error
        try:
            vocabulary = Vocabulary(tokenizer, codebook)
        except ValueError as error:
            raise _broken(folder, "tokenizer.json", str(error)) from error
        yield Progress(stage="Loading the planner", step=1, steps=2)
        with load_errors(fail, "config.json"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "qwen3" or not qwen3.supports(config):
            raise fail("config.json", "is not that of a planner")
        fields = frozenset(getattr(config, "plan_fields", FIELDS))
        model = load_transformers(
            AutoModelForCausalLM,
            folder,
            fail,
            check_finite=True,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
        )
        if vocabulary.size > config.vocab_size:
            raise StudioError(
                "model-mismatch",
                model=folder.name,
                problem=f"{vocabulary.size} words for {config.vocab_size} embeddings",
                fix=f"Put a whole copy of the planner into {folder.name}",
            )
        model.to(device)
        yield Progress(stage="Loading the planner", step=2, steps=2)
        planner = cls(model, vocabulary, device, fields)
        if device == "cuda" and compiling():
            planner.qwen.compile()
        return planner

    def plan(
        self,
        caption: str,
        lyrics: str,
        fields: Collection[str],
        given: Mapping[str, Any],
        sampling: SamplingParams,
        seed: int,
        max_duration_s: int = plan_format.MAX_DURATION_S,
        edition: int = EDITION,
    ) -> Generator[Progress, None, Plan]:
        """Write the requested `fields` of a plan. `given` values stay, and lead the others.

        Without guidance: the authors' default distorts the caption's words, and the constraint
        leaves it little to decide elsewhere. Nothing is computed where every field is given.

        Args:
            edition: of the rules (`core.requests.EDITION`): keys, and the length of the caption.

        Raises:
            StudioError: `lyrics-too-long`.
        """
        if set(fields) <= set(given):
            return Plan.from_fields(given, edition)
        constraint = PlanConstraint(self.vocabulary, fields, given, max_duration_s, 0, edition)
        prompt = plan_format.plan_prompt(caption, lyrics)
        plan, _ = yield from self._write("Planning", prompt, constraint, sampling, seed, lyrics)
        return plan

    def compose(
        self,
        caption: str,
        lyrics: str,
        plan: Plan,
        duration_s: float,
        sampling: SamplingParams,
        seeds: Sequence[int],
        guidance: float = 1.0,
        negative_prompt: str = "",
        edition: int = EDITION,
    ) -> Generator[Progress, None, list[list[int]]]:
        """Write audio codes for a song, exactly five a second, once for each seed.

        Args:
            guidance: above 1, away from `negative_prompt`, or from a song without any request.
            edition: 1 decodes eagerly on CUDA too, and so keeps the codes of that edition.

        Returns:
            For each seed a list of int(5 * duration_s) codes, the same whether made alone or not.

        Raises:
            StudioError: `lyrics-too-long`.
        """
        stage, vocabulary = "Composing codes", self.vocabulary
        prompts = [vocabulary.encode(plan_format.codes_prompt(caption, lyrics, plan))]
        if guidance > 1:
            prompts.append(vocabulary.encode(plan_format.unconditional_prompt(negative_prompt)))
        count = int(duration_s * plan_format.CODE_RATE)
        total = count * len(seeds)
        cache = self._cache(prompts, count, lyrics)
        hidden = yield from self._read_prompts(cache, stage, total)
        decoder = code_decoder(self.qwen, static=edition >= 2)(
            self.qwen, cache, self.code_head, vocabulary.first_code, count, guidance, sampling
        )
        reported, songs = time.monotonic(), []
        for seed in seeds:
            decoder.start(hidden, uniform_draws(seed, count, self.device))
            while True:
                if time.monotonic() - reported > PROGRESS_INTERVAL_S:
                    decoder.wait()  # so that what is reported has been done
                    reported = time.monotonic()
                    step = len(songs) * count + decoder.done
                    yield Progress(stage=stage, step=step, steps=total)
                if decoder.done == count:
                    break
                decoder.step()
            songs.append(decoder.codes.tolist())
        yield Progress(stage=stage, step=total, steps=total)
        return songs

    def understand(
        self,
        codes: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        lyrics: bool = True,
        fields: Collection[str] = FIELDS,
        edition: int = EDITION,
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """Describe a song: tempo, key, time signature, language, length, genres and a caption.

        Args:
            codes: of the song, five a second. Of a song that is longer than the model's context
                (580 s for the embedded model, two hours for the large ones) the beginning is read.
            lyrics: also write down the lyrics, which takes much longer.
            fields: those to write; a caption takes most of the time.
            edition: as in `plan`.

        Returns:
            The plan, and the lyrics or "".

        Raises:
            ValueError: a code outside the quantiser.
        """
        if not all(0 <= code < self.vocabulary.codebook for code in codes):
            raise ValueError(f"codes run from 0 to {self.vocabulary.codebook - 1}")
        lyric_tokens = plan_grammar.DETECTED_LYRIC_TOKENS if lyrics else 0
        constraint = self._full_constraint(
            {}, plan_format.MAX_DURATION_S, lyric_tokens, fields, edition
        )
        longest = self.context_length - _plan_tokens(constraint) - 160
        prompt = plan_format.understand_prompt(codes[: max(0, longest)])
        return (yield from self._write("Listening", prompt, constraint, sampling, seed))

    def inspire(
        self,
        query: str,
        instrumental: bool,
        sampling: SamplingParams,
        seed: int,
        language: str = "unknown",
        max_duration_s: int = plan_format.MAX_DURATION_S,
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """Write the plan and the lyrics of a whole song from one idea, or from none."""
        given = {"language": language} if language != "unknown" else {}
        constraint = self._full_constraint(given, max_duration_s, plan_grammar.LYRIC_TOKENS)
        prompt = plan_format.inspire_prompt(query, instrumental)
        stage = "Thinking of a song"
        plan, lyrics = yield from self._write(stage, prompt, constraint, sampling, seed)
        return plan, (INSTRUMENTAL if instrumental and not lyrics else lyrics)

    def rewrite(
        self,
        caption: str,
        lyrics: str,
        given: Mapping[str, Any],
        sampling: SamplingParams,
        seed: int,
        max_duration_s: int = plan_format.MAX_DURATION_S,
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """Write style and lyrics in the form of the training data: fuller, with section tags.

        Raises:
            StudioError: `lyrics-too-long`.
        """
        constraint = self._full_constraint(given, max_duration_s, plan_grammar.LYRIC_TOKENS)
        prompt = plan_format.rewrite_prompt(caption, lyrics)
        return (yield from self._write("Rewriting", prompt, constraint, sampling, seed, lyrics))

    def _full_constraint(
        self,
        given: Mapping[str, Any],
        max_duration_s: int,
        lyric_tokens: int,
        fields: Collection[str] = FIELDS,
        edition: int = EDITION,
    ) -> PlanConstraint:
        """A constraint with every requested field that this model was trained to write."""
        fields = self.fields & set(fields)
        return PlanConstraint(self.vocabulary, fields, given, max_duration_s, lyric_tokens, edition)

    def _write(
        self,
        stage: str,
        prompt: str,
        constraint: PlanConstraint,
        sampling: SamplingParams,
        seed: int,
        lyrics: str = "",
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """Let the model write under `constraint`. A step is a field; one more is for free text.

        Forced tokens are read together with the one before them. After a long prompt, free text is
        limited to what is left of the context.
        """
        import torch

        ids, capacity = self.vocabulary.encode(prompt), _plan_tokens(constraint)
        spare = self.context_length - len(ids) - capacity
        constraint.lyric_tokens = max(0, min(constraint.lyric_tokens, spare))
        capacity += constraint.lyric_tokens
        steps = len(constraint.fields) + bool(constraint.lyric_tokens)
        cache, choices = self._cache([ids], capacity, lyrics), constraint.choices()
        hidden = yield from self._read_prompts(cache, stage, steps)
        read, reported, chosen = 0, time.monotonic(), None
        for draw in uniform_draws(seed, capacity, self.device):
            try:
                choice = next(choices) if chosen is None else choices.send(chosen)
            except StopIteration:
                break
            new = constraint.tokens[read:]
            read += len(new)
            if new:
                hidden = self.qwen.forward(torch.tensor([new], device=self.device), cache)
            chosen = self._choose(hidden[0], choice, draw, sampling)
            if time.monotonic() - reported > PROGRESS_INTERVAL_S:
                reported = time.monotonic()
                yield Progress(stage=stage, step=constraint.done, steps=steps)
        yield Progress(stage=stage, step=steps, steps=steps)
        return constraint.plan(), plan_format.parse_lyrics(constraint.text())

    def _choose(
        self,
        hidden: torch.Tensor,
        choice: TokenChoice,
        draw: torch.Tensor,
        sampling: SamplingParams,
    ) -> int:
        """One of the legal tokens, from the hidden state [width]."""
        import torch
        from torch.nn.functional import linear

        with torch.inference_mode():
            if len(choice.legal) <= FEW_TOKENS:
                few = torch.tensor(choice.legal, device=self.device)
                logits = linear(hidden, self.output_head[few])
            else:
                logits = linear(hidden, self.output_head)[self._legal_tensor(choice.legal)]
            how = GREEDY if choice.greedy else sampling
            return choice.legal[int(sample_token(logits.float(), draw, how))]

    def _legal_tensor(self, legal: tuple[int, ...]) -> torch.Tensor:
        """The ids of a large set, on the device. There are a handful, which live with the model."""
        import torch

        if id(legal) not in self._legal_ids:
            self._legal_ids[id(legal)] = (legal, torch.tensor(legal, device=self.device))
        return self._legal_ids[id(legal)][1]

    def _cache(
        self, prompts: Sequence[Sequence[int]], capacity: int, lyrics: str
    ) -> qwen3.KeyValueCache:
        """A cache for the prompts and what follows them, if it fits into the context.

        Raises:
            StudioError: `lyrics-too-long`.
        """
        limit, longest = self.context_length, max(map(len, prompts))
        tokens = longest + capacity
        if tokens > limit:
            length = describe_length(lyrics, 0.8 * max(0, limit - capacity) / longest)
            raise StudioError("lyrics-too-long", tokens=tokens, limit=limit, length=length)
        return qwen3.KeyValueCache(self.qwen, prompts, capacity)

    def _read_prompts(
        self, cache: qwen3.KeyValueCache, stage: str, steps: int
    ) -> Generator[Progress, None, torch.Tensor]:
        """Read the prompts chunk by chunk; returns the hidden states of their last tokens."""
        hidden = None
        for chunk in cache.prompts.split(PROMPT_CHUNK, 1):
            yield Progress(stage=stage, step=0, steps=steps)
            hidden = self.qwen.forward(chunk, cache)
        return hidden


def _plan_tokens(constraint: PlanConstraint) -> int:
    """Room in the context for a plan, ample for its longest form."""
    genres = "genres" in constraint.fields
    return plan_grammar.CAPTION_TOKENS + genres * plan_grammar.GENRE_TOKENS + OTHER_FIELD_TOKENS


def _broken(folder: Path, file: str, problem: str) -> StudioError:
    fix = f"Put a whole copy of the planner into {folder.name}"
    return StudioError("model-broken", model=folder.name, file=file, problem=problem, fix=fix)
