"""The miniature's parts, each the real class of diffusers or transformers at a small size."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AceStepTransformer1DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
    _pack_sequences,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from mini.compose import BEAT_FRAMES, SCALES, STYLES, Piece
from mini.prompts import order_embeddings
from mini.vae import LATENTS

WINDOW = 5  # latent frames in one audio code
FSQ_LEVELS = (4, 4, 4, 4, 4, 4)  # 4096 codes
SILENCE_FRAMES = 15_000  # 600 s, as the pipeline expects
TIMBRE_FRAMES = 750  # 30 s of reference
CLOCK = 1.0  # how loud the clock is beside latents of unit variance
READ = 4 + len(BEAT_FRAMES) + 12 + len(STYLES)  # numbers of a reading


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; every attention head has 64 channels but the tokenizer's 32."""

    text: int = 192
    text_layers: int = 2
    condition: int = 256
    hidden: int = 256
    inner: int = 704
    layers: int = 6
    code: int = 128
    code_layers: int = 2


TINY = Sizes(
    text=64, text_layers=1, condition=64, hidden=64, inner=128, layers=2, code=64, code_layers=1
)


def heads(width: int, channels: int = 64) -> dict[str, int]:
    """Attention of a width: all heads, half as many for keys and values."""
    count = max(1, width // channels)
    return {
        "num_attention_heads": count,
        "num_key_value_heads": max(1, count // 2),
        "head_dim": channels,
    }


def clock(frames: int) -> Tensor:
    """The beat clock (frames, 64): sine and cosine of every tempo's beat and bar, frame by frame.

    Attention here knows distances only, and the silence latent is what text-to-music reads as its
    source. Written into it, the clock tells each frame its place in the sixteenth, the beat and the
    bar at any tempo of the grid; the prompt says which hands to watch. It repeats: it has no end.
    """
    periods = sorted({beat * n for beat in BEAT_FRAMES for n in (0.25, 0.5, 1, 2, 3, 4)})
    angle = 2 * math.pi * torch.arange(frames)[:, None] / torch.tensor(periods)
    hands = CLOCK * torch.cat([angle.sin(), angle.cos()], dim=1)
    return F.pad(hands, (0, LATENTS - hands.shape[1]))


def silence_latent(encoded: Tensor) -> Tensor:
    """Encoded silence (64,) of unit scale with the clock on it, (1, 15000, 64)."""
    return (encoded + clock(SILENCE_FRAMES))[None]


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> Qwen3Model:
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=2 * sizes.text,
            num_hidden_layers=sizes.text_layers,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **heads(sizes.text),
        )
    )
    order_embeddings(encoder.embed_tokens.weight.data, tokenizer)
    return encoder


@torch.no_grad()
def build_condition_encoder(sizes: Sizes) -> AceStepConditionEncoder:
    encoder = AceStepConditionEncoder(
        hidden_size=sizes.condition,
        intermediate_size=2 * sizes.condition,
        text_hidden_dim=sizes.text,
        timbre_hidden_dim=LATENTS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=2,  # one layer alone would hear only the first 5 s
        sliding_window=128,
        rope_theta=10_000.0,
        **heads(sizes.condition),
    )
    encoder.null_condition_emb.mul_(0.5)
    encoder.timbre_encoder.special_token.mul_(0.02).requires_grad_(False)  # it is never read
    return encoder


@torch.no_grad()
def build_transformer(sizes: Sizes) -> AceStepTransformer1DModel:
    """The DiT, initialised so that the noisy latents pass straight through it.

    Identity rows carry both frames of a patch from the input to the output, half strength; gates
    are open. It learns the rest of the velocity several times sooner than from the default.
    """
    model = AceStepTransformer1DModel(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        in_channels=3 * LATENTS,
        audio_acoustic_hidden_dim=LATENTS,
        patch_size=2,
        sliding_window=64,
        rope_theta=10_000.0,
        encoder_hidden_size=sizes.condition,
        is_turbo=False,
        model_version="sft",
        **heads(sizes.hidden),
    )
    enter, leave = model.proj_in_conv, model.proj_out_conv
    enter.weight.mul_(1.7)
    leave.weight.normal_(0, 0.01)
    leave.bias.zero_()
    channels = torch.arange(min(LATENTS, sizes.hidden // 2))
    for frame in range(2):
        rows = frame * len(channels) + channels
        enter.weight[rows] = 0
        enter.weight[rows, 2 * LATENTS + channels, frame] = 1
        leave.weight[rows, channels, frame] = 0.5
    for block in model.layers:
        block.mlp.down_proj.weight.mul_(0.5)
        block.self_attn.to_out[0].weight.mul_(0.7)
        block.cross_attn.to_out[0].weight.mul_(0.7)
        block.scale_shift_table.mul_(0.1)
        block.scale_shift_table[:, (2, 5)] += 1
    for embed in (model.time_embed, model.time_embed_r):
        embed.time_proj.weight.mul_(0.3)
        embed.time_proj.bias.zero_()
    return model


def build_audio_tokenizer(
    sizes: Sizes,
) -> tuple[AceStepAudioTokenizer, AceStepAudioTokenDetokenizer]:
    common = {
        "hidden_size": sizes.code,
        "intermediate_size": 2 * sizes.code,
        "audio_acoustic_hidden_dim": LATENTS,
        "pool_window_size": WINDOW,
        "num_attention_pooler_hidden_layers": sizes.code_layers,
        **heads(sizes.code, 32),
    }
    tokenizer = AceStepAudioTokenizer(
        fsq_dim=sizes.code, fsq_input_levels=list(FSQ_LEVELS), **common
    )
    return tokenizer, AceStepAudioTokenDetokenizer(**common)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)


def reading(piece: Piece, start: int, frames: int, step: int) -> Tensor:
    """What the caption of a piece means at every `step`-th frame from `start` on, (n, READ).

    Sine and cosine of the place in the beat and in the bar, which tempo, which scale, which style.
    """
    at = torch.arange(start, start + frames, step)[:, None]
    angle = 2 * math.pi * at / torch.tensor([piece.beat_frames, piece.bar_frames])
    tempo = [float(beat == piece.beat_frames) for beat in BEAT_FRAMES]
    scale = {(piece.tonic + step) % 12 for step in SCALES[piece.mode]}
    style = [float(name == piece.style) for name in STYLES]
    facts = torch.tensor([*tempo, *(float(tone in scale) for tone in range(12)), *style])
    return torch.cat([angle.sin(), angle.cos(), facts.expand(len(at), -1)], dim=1)


class Generator(nn.Module):
    """Text encoder, condition encoder and DiT, trained together.

    In training a linear reader of the DiT's second block predicts `reading`, a pair of frames at a
    time: the words must arrive there, and be joined with the clock, before any sound depends on
    it. The reader is not exported.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sizes: Sizes, silence: Tensor):
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer, sizes)
        self.condition_encoder = build_condition_encoder(sizes)
        self.transformer = build_transformer(sizes)
        self.condition_encoder.silence_latent.copy_(silence)
        self.reader = nn.Linear(sizes.hidden, READ)
        self.hidden: Tensor | None = None
        self.transformer.layers[1].register_forward_hook(self._hear)

    def _hear(self, _block: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.hidden = output if self.training else None

    @property
    def silence(self) -> Tensor:
        """The silence latent (15000, 64)."""
        return self.condition_encoder.silence_latent[0]

    @torch.no_grad()
    def silent_timbre(self) -> Tensor:
        """What the timbre encoder makes of no reference, (1, 1, width)."""
        order = torch.zeros(1, dtype=torch.long, device=self.silence.device)
        return self.condition_encoder.timbre_encoder(self.silence[None, :TIMBRE_FRAMES], order)[0]

    def conditions(
        self, text: dict[str, Tensor], lyric: dict[str, Tensor], timbre: Tensor
    ) -> Tensor:
        """Packed condition (B, S, width): lyric, timbre, text, as the pipeline packs them.

        `text` and `lyric` are a tokenizer's ids and masks; `timbre` is (B, 1, width).
        """
        encoder = self.condition_encoder
        words = encoder.text_projector(
            self.text_encoder(input_ids=text["input_ids"]).last_hidden_state
        )
        mask = lyric["attention_mask"].bool()
        sung = encoder.lyric_encoder(self.text_encoder.embed_tokens(lyric["input_ids"]), mask)
        present = torch.ones(len(timbre), 1, dtype=torch.bool, device=timbre.device)
        packed, mask = _pack_sequences(sung, timbre.to(sung.dtype), mask, present)
        packed, _ = _pack_sequences(
            packed, words.to(packed.dtype), mask, text["attention_mask"].bool()
        )
        return packed

    def velocity(self, noisy: Tensor, time: Tensor, conditions: Tensor, context: Tensor) -> Tensor:
        """Predicted velocity (B, T, 64) at `time` (B,), 1 being noise; context is (B, T, 128)."""
        return self.transformer(
            hidden_states=noisy,
            timestep=time,
            timestep_r=time,
            encoder_hidden_states=conditions,
            context_latents=context,
            return_dict=False,
        )[0].float()

    def read(self) -> Tensor:
        """The reader's guess (B, T / 2, READ) at what the last `velocity` was conditioned on."""
        return self.reader(self.hidden).float()
