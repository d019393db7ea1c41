"""Writes the trained parts as one checkpoint in the layout of the large model."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AceStepPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from mini.model import Generator, scheduler
from mini.planner import FIELDS
from mini.train_tokens import Codes
from mini.vae import Codec, LatentScale, export

SHARD = "15MB"
LIMIT_FILE, LIMIT_ALL, LIMIT_PARAMETERS = 16_000_000, 60_000_000, 30_000_000


def assemble(
    codec: Codec,
    scale: LatentScale,
    codes: Codes,
    generator: Generator,
    tokenizer: PreTrainedTokenizerFast,
) -> AceStepPipeline:
    """The stock pipeline over the trained parts, in float32."""
    return AceStepPipeline(
        vae=export(codec, scale),
        text_encoder=generator.text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=generator.transformer.eval(),
        condition_encoder=generator.condition_encoder.eval(),
        scheduler=scheduler(),
        audio_tokenizer=codes.tokenizer.eval(),
        audio_token_detokenizer=codes.detokenizer.eval(),
    )


def save_planner(
    planner: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """The planner as the original is stored: the bare backbone, keys without a `model.` prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        k: v.half().contiguous() for k, v in planner.model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = planner.config.to_dict()
    config |= {"architectures": ["Qwen3Model"], "dtype": "float16", "plan_fields": list(FIELDS)}
    config.pop("_attn_implementation_internal", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    tokenizer.save_pretrained(folder)


def write(
    folder: Path,
    pipeline: AceStepPipeline,
    planner: Qwen3ForCausalLM | None,
    words: PreTrainedTokenizerFast | None,
) -> None:
    """Writes float16 safetensors into `folder`, other files there untouched, and checks the limits."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True, max_shard_size=SHARD)
    pipeline.to(torch.float32)
    if planner is not None:
        save_planner(planner, words, fresh / "planner")
    folder.mkdir(parents=True, exist_ok=True)
    for part in fresh.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    fresh.rmdir()
    check_limits(folder)


def check_limits(folder: Path) -> tuple[int, int]:
    """(parameters, bytes) of a checkpoint; refuses one that is too large."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    total = sum(path.stat().st_size for path in files)
    parameters = count_parameters(folder)
    if largest.stat().st_size > LIMIT_FILE:
        raise ValueError(f"{largest} is larger than {LIMIT_FILE} bytes.")
    if total > LIMIT_ALL or parameters > LIMIT_PARAMETERS:
        raise ValueError(
            f"The checkpoint holds {parameters} parameters in {total} bytes: too large."
        )
    return parameters, total


def count_parameters(folder: Path) -> int:
    """Weights in all safetensors files, the silence latent (a constant) left out."""
    from safetensors import safe_open

    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                if name != "silence_latent":
                    size = 1
                    for extent in weights.get_slice(name).get_shape():
                        size *= extent
                    count += size
    return count
