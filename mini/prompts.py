"""Prompt formats of ACE-Step and the small tokenizers that read them.

Tempi, durations and keys are single tokens, and so are the fixed phrases of the templates: the
text encoder has little to read before it comes to what matters.
"""

import math
import random
from pathlib import Path

import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import SFT_GEN_PROMPT, TASK_INSTRUCTIONS
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mini.captions import LINES, caption, lyrics
from mini.compose import compose

END = "<|endoftext|>"
NUMBERS = range(1, 601)
MODES = ("major", "minor")
SECTION_TAGS = ("[instrumental]", "[intro]", "[verse]", "[chorus]", "[bridge]", "[outro]")
PHRASES = (
    *(
        f"# Instruction\n{TASK_INSTRUCTIONS[task]}\n\n# Caption\n"
        for task in ("text2music", "repaint", "cover")
    ),
    "\n\n# Metas\n- bpm: ",
    "\n- timesignature: ",
    "\n- keyscale: ",
    "\n- duration: ",
    " seconds\n",
    "# Languages\n",
    "\n\n# Lyric\n",
)


def text_prompt(
    words: str,
    task: str,
    bpm: int | None,
    keyscale: str | None,
    timesignature: str | None,
    seconds: float,
) -> str:
    """The prompt of the text encoder; what is None is printed as N/A."""
    shown = [str(value) if value else "N/A" for value in (bpm, timesignature, keyscale)]
    metas = "- bpm: {}\n- timesignature: {}\n- keyscale: {}\n".format(*shown)
    return SFT_GEN_PROMPT.format(
        TASK_INSTRUCTIONS[task], words, f"{metas}- duration: {int(seconds)} seconds\n"
    )


def lyric_prompt(text: str, language: str) -> str:
    return f"# Languages\n{language}\n\n# Lyric\n{text}{END}"


def key_names() -> dict[str, tuple[int, str]]:
    """The 70 names a key may have (letters, #, b and the musical signs) -> tonic, mode."""
    tonics = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    signs = {"": 0, "#": 1, "b": -1, "\u266f": 1, "\u266d": -1}
    return {
        f"{letter}{sign} {mode}": ((tonic + shift) % 12, mode)
        for letter, tonic in tonics.items()
        for sign, shift in signs.items()
        for mode in MODES
    }


def sample_texts(count: int, seed: int = 1) -> list[str]:
    """Captions and lyrics of the corpus, to learn the byte pairs from."""
    rng = random.Random(seed)
    texts = list(LINES) * 4
    for _ in range(count):
        piece = compose(rng.randrange(10**6), seconds=8.0)
        texts += [caption(piece, rng), lyrics(piece, rng, 0, 200)]
    return texts


def train_bpe(
    texts: list[str], size: int, lowercase: bool, special: list[str]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `special` are its first ids, END among them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="right",
        model_max_length=4096,
    )


def text_tokenizer(folder: Path, pieces: int = 600) -> PreTrainedTokenizerFast:
    """The text encoder's tokenizer: read from `folder`, or made and written there."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_bpe(sample_texts(pieces), 640, lowercase=True, special=[END])
    tokenizer.add_tokens([AddedToken(phrase, normalized=True) for phrase in PHRASES])
    tokenizer.add_tokens([AddedToken(tag, normalized=True) for tag in SECTION_TAGS])
    tokenizer.add_tokens(
        [AddedToken(name, single_word=True, normalized=True) for name in key_names()]
    )
    tokenizer.add_tokens([AddedToken(str(n), single_word=True, normalized=True) for n in NUMBERS])
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def order_embeddings(
    table: torch.Tensor, tokenizer: PreTrainedTokenizerFast, scale: float = 0.5
) -> None:
    """Gives number tokens smooth, ordered rows (log frequency) and puts keys on the circle of fifths.

    Neighbouring tempi start alike, so a tempo never seen falls to its neighbours; a key and its
    relative start alike, and two spellings of one key are the same.
    """
    width = table.shape[1]
    table.normal_(0, scale)
    rates = torch.exp(torch.linspace(math.log(2), math.log(60), width // 2))
    for number in NUMBERS:
        angle = math.log2(number / 40) * rates
        row = 1.2 * scale * torch.cat([angle.sin(), angle.cos()])
        table[tokenizer.convert_tokens_to_ids(str(number))] = row
    rows = {(tonic, mode): scale * torch.randn(width) for tonic in range(12) for mode in MODES}
    for name, (tonic, mode) in key_names().items():
        fifths = 7 * (tonic if mode == "major" else tonic + 3) % 12
        angle = 2 * math.pi * fifths / 12 * torch.arange(1, 7)
        row = rows[tonic, mode].clone()
        row[:12] = 2 * scale * torch.cat([angle.sin(), angle.cos()])
        table[tokenizer.convert_tokens_to_ids(name)] = row
