"""The planner's gates: valid plans that follow the caption, and correct descriptions of codes."""

import random

import numpy as np
import torch
import yaml
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from mini import measure
from mini.captions import caption, grid_tempi
from mini.compose import FRAMES_PER_SECOND, Piece
from mini.dataset import FRAMES, Corpus
from mini.eval import Gate, key_of, share
from mini.measure import Key
from mini.planner import (
    CODES_PER_SECOND,
    FIELDS,
    STOP,
    THINK,
    THOUGHT,
    UNDERSTAND,
    chat,
    code_token,
    generate_prompt,
)
from mini.prompts import key_names

KEYS = key_names()


@torch.no_grad()
def complete(
    planner: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    stop: str,
    most: int = 90,
) -> str:
    """The planner's most likely words after a prompt, up to and without `stop`."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids(stop)
    made = planner.generate(
        ids, max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return tokenizer.decode(made[0, ids.shape[1] :]).removesuffix(stop)


def read_plan(text: str) -> dict[str, object] | None:
    """The plan of a think block, or None if it is not one an engine could use."""
    body = text.strip().removeprefix(THINK)
    try:
        plan = yaml.safe_load(body)
    except yaml.YAMLError:
        return None
    if not isinstance(plan, dict) or not set(plan) <= set(FIELDS) or "bpm" not in plan:
        return None
    bpm, duration, metre = plan.get("bpm"), plan.get("duration"), plan.get("timesignature")
    legal = (
        isinstance(bpm, int)
        and 30 <= bpm <= 300
        and isinstance(duration, int)
        and 10 <= duration <= 600
    )
    return plan if legal and metre in (2, 3, 4, 6) and plan.get("keyscale") in KEYS else None


def planning_gates(
    planner: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]
) -> list[Gate]:
    """Plans from captions that name tempo and key."""
    valid, follows = [], []
    for piece in pieces:
        words = f"{caption(piece, random.Random(piece.seed), mention=0.0)}, {piece.bpm} bpm, {piece.key}"
        plan = read_plan(
            complete(planner, tokenizer, generate_prompt(words, "[Instrumental]"), THOUGHT)
        )
        valid.append(plan is not None)
        follows.append(
            plan is not None
            and abs(plan["bpm"] / piece.bpm - 1) < 0.04
            and KEYS[plan["keyscale"]] == (piece.tonic, piece.mode)
        )
    return [
        share("planner: plan is valid", 1.0, valid, "greedy, unconstrained"),
        share("planner: tempo and key follow the caption", 0.9, follows),
    ]


def listening_gates(
    planner: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    codes: np.ndarray,
    count: int,
) -> list[Gate]:
    """What the planner recognises in the codes of 20 s of held-out music."""
    tempi, keys = [], []
    length = 20 * CODES_PER_SECOND
    for index in range(count):
        piece = corpus.pieces[index]
        start = random.Random(index).randrange(FRAMES - 21 * FRAMES_PER_SECOND)
        row = codes[index, start % 5, start // 5 : start // 5 + length]
        prompt = chat(UNDERSTAND, "".join(code_token(int(code)) for code in row))
        plan = read_plan(complete(planner, tokenizer, prompt, THOUGHT))
        tempi.append(plan is not None and measure.tempo_right(plan["bpm"], piece.bpm))
        keys.append(
            plan is not None and measure.key_right(Key(*KEYS[plan["keyscale"]]), key_of(piece))
        )
    return [
        share("listening: tempo right", 0.8, tempi, f"{len(grid_tempi())} tempi"),
        share("listening: key or relative right", 0.6, keys, "12 pairs of keys"),
    ]


__all__ = ["STOP", "complete", "listening_gates", "planning_gates", "read_plan"]
