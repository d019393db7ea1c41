"""How a finished song attends to its lyrics: one more forward pass, of which attention is kept.

Only some heads of the transformer follow the lyrics. Which ones was found by the model's authors for
each of its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from core.results import LyricLine, Progress
from models import lyric_timing, sampler

if TYPE_CHECKING:
    import numpy as np
    import torch

    from models.acestep import Conditions, Engine

STAGE = "Timing the lyrics"

HEADS: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {
    (32, 32): {3: (18, 27), 4: (22,), 5: (5, 6, 7), 6: (2, 12, 13), 7: (20, 21)},
    (24, 16): {2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)},
}
"""The heads whose cross-attention follows the lyrics, by layer, for XL and for 2B; they are told
apart by their numbers of layers and of heads. Source: the authors' lyric alignment settings."""

NOISE_SEED = 42
"""The noise of the pass is the same for every song. Source: the authors' lyric timing."""

QUERIES = 1024
"""Frames whose attention is computed at once, which bounds the memory: 10 MB a head for XL."""

NOT_SURE = "The lyrics could not be timed: the model's attention to them follows no clear order."

FAILED = "The lyrics could not be timed: the timing failed. The song is complete."

UNKNOWN_SHAPE = "The lyrics were not timed: no lyric timing is known for a model of this shape."


def lyric_spans(
    tokens: Sequence[tuple[int, int]], text: str, lyrics: str
) -> tuple[int, list[tuple[int, int]]]:
    """The tokens that hold lyrics, among those of the text that the model read.

    Args:
        tokens: where each token stands in `text`, as first and last + 1 character.
        text: by `acestep.lyric_text`.
        lyrics: those in `text`.

    Returns:
        The first such token, and where each stands in `lyrics`.
    """
    start = text.rindex(lyrics)
    end = start + len(lyrics)
    inside = [i for i, (a, b) in enumerate(tokens) if b > start and a < end]
    return inside[0], [(max(tokens[i][0] - start, 0), tokens[i][1] - start) for i in inside]


def time_lyrics(
    engine: Engine,
    conditions: Conditions,
    latents: torch.Tensor,
    lyrics: str,
    language: str,
    steps: int,
    within: Sequence[tuple[float, float]] = (),
) -> Generator[Progress, None, tuple[tuple[LyricLine, ...], str]]:
    """When the lines of `lyrics` are sung in the song of `latents`.

    Args:
        latents: float32 [1, frames, channels], as they were denoised under `conditions`.
        lyrics, language: as the model read them.
        steps: of the song. The pass is made at the time of the last step of an even schedule.
        within: parts of the song in which the lyrics can be, in seconds; everywhere if empty.

    Returns:
        The lines, and a note where there are none (as the generator's return value).
    """
    import numpy as np

    from models.acestep import lyric_text
    from models.vae import FRAME_RATE

    yield Progress(stage=STAGE, step=0, steps=2)
    transformer = engine.pipe.transformer
    config = transformer.config
    heads = HEADS.get((config.num_hidden_layers, config.num_attention_heads))
    if heads is None:
        return (), UNKNOWN_SHAPE
    text = lyric_text(lyrics, language)
    encoded = engine.pipe.tokenizer(text, return_offsets_mapping=True)
    first, spans = lyric_spans(encoded["offset_mapping"], text, lyrics)
    maps = attention_maps(
        engine, conditions, latents, heads, 1 / steps, slice(first, first + len(spans))
    )
    yield Progress(stage=STAGE, step=1, steps=2)
    frame_s = config.patch_size / FRAME_RATE
    allowed = None
    if within:
        middles = (np.arange(maps[0].shape[1]) + 0.5) * frame_s
        allowed = np.any([(a <= middles) & (middles < b) for a, b in within], axis=0)
    lines = lyric_timing.time_lyrics(maps, lyrics, spans, frame_s, allowed)
    yield Progress(stage=STAGE, step=2, steps=2)
    return lines, "" if lines else NOT_SURE


def attention_maps(
    engine: Engine,
    conditions: Conditions,
    latents: torch.Tensor,
    heads: dict[int, tuple[int, ...]],
    t: float,
    tokens: slice,
) -> list[np.ndarray]:
    """The attention of each head to `tokens` of the condition, float16 [tokens, frames].

    The latents are noised to time `t` and pass through the transformer once, with the condition
    alone, as far as the last layer of `heads`. Shares are of all tokens of the condition, so that
    they show where a frame attends to none of these. The transformer is left as it was.

    Args:
        heads: numbers of the heads by layer.
    """
    import torch

    transformer, fast = engine.pipe.transformer, engine.fast
    noise, _ = sampler.draw_noise(NOISE_SEED, latents.shape[1], latents.shape[2])
    x = t * noise.to(latents) + (1 - t) * latents
    condition, context = conditions.cond, conditions.context
    found: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), ExitStack() as undo:
        if fast:
            constants = fast.prepare(condition, conditions.null, context.shape[1])
            fast.bind(constants)
            condition = constants.placeholder
            if fast.compiled:  # compiled layers know the processors they were compiled with
                undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_shortened(transformer, max(heads) + 1))
        for layer, chosen in heads.items():
            attention = transformer.layers[layer].cross_attn
            undo.callback(attention.set_processor, attention.processor)
            attention.set_processor(
                _Recorder(attention.processor, chosen, tokens, found.__setitem__, layer)
            )
        timestep = torch.full((1,), t, device=engine.device, dtype=engine.dtype)
        transformer(
            hidden_states=x.to(engine.dtype),
            timestep=timestep,
            timestep_r=timestep,
            encoder_hidden_states=condition,
            context_latents=context,
            return_dict=False,
        )
    return [head.numpy() for layer in sorted(found) for head in found[layer]]


@contextmanager
def _shortened(transformer: torch.nn.Module, layers: int) -> Generator[None]:
    """Let a transformer end after its first `layers`: what the others would compute is not used."""
    import torch

    whole = transformer.layers
    transformer.layers = torch.nn.ModuleList(list(whole)[:layers])
    try:
        yield
    finally:
        transformer.layers = whole


class _Recorder:
    """An attention processor that keeps what some heads attend to, and does what another does."""

    def __init__(
        self,
        processor: Any,
        heads: tuple[int, ...],
        tokens: slice,
        keep: Callable[[int, torch.Tensor], None],
        layer: int,
    ) -> None:
        self._processor, self._heads, self._tokens = processor, heads, tokens
        self._keep, self._layer = keep, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[1, frames, hidden width] to the same."""
        import torch

        kept = getattr(self._processor, "constants", None)  # the fast transformer has the keys
        if kept is None:
            keys = attn.norm_k(attn.to_k(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)))
            keys = keys.transpose(1, 2)
        else:
            keys = kept.keys
        chosen = torch.tensor(self._heads, device=hidden_states.device)
        keys = keys[0, chosen // (attn.heads // attn.kv_heads)].float()
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        query = query[0].transpose(0, 1)[chosen].float()
        parts = [
            (part @ keys.transpose(1, 2) * attn.scaling).softmax(-1)[..., self._tokens].half().cpu()
            for part in query.split(QUERIES, dim=1)
        ]
        self._keep(self._layer, torch.cat(parts, dim=1).transpose(1, 2))
        return self._processor(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
