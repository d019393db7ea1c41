"""Makes the embedded model from nothing: `python -m mini make`, then `python -m mini report`.

Every stage keeps its state under the work folder and resumes from it.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mini import eval as evaluation
from mini import planner, planner_eval, resume, train_generator, train_tokens, train_vae
from mini.dataset import Corpus, build_corpus, encode_silence
from mini.export import assemble, check_limits, write
from mini.model import FSQ_LEVELS, TINY, Sizes, silence_latent
from mini.plots import draw_spectrograms
from mini.prompts import text_tokenizer
from mini.training import PROCESSES, Run

ROOT = Path(__file__).resolve().parents[1]
CODE_COUNT = torch.Size(FSQ_LEVELS).numel()


@dataclass(frozen=True)
class Recipe:
    """How much of everything: pieces of the corpus; steps and batch of each training."""

    pieces: int
    held_out: int
    codec: tuple[int, int]
    tokens: tuple[int, int]
    generator: tuple[int, int]
    planner: tuple[int, int]
    sizes: Sizes
    processes: int = PROCESSES
    lengths: tuple[int, ...] = train_generator.LENGTHS

    def run(self, work: Path, stage: str) -> Run:
        steps, batch = getattr(self, stage)
        return Run(work / stage, steps, batch, self.processes)


FULL = Recipe(4000, 96, (1250, 16), (700, 64), (8000, 12), (4000, 10), Sizes())
SMALL = Recipe(6, 2, (2, 4), (2, 8), (2, 4), (2, 2), TINY, 1, (64,))


def make(work: Path, vendor: Path, recipe: Recipe, start: Path | None = None) -> None:
    """All stages in turn; the finished checkpoint is written to `vendor`.

    `start` is a checkpoint whose codec and codes are kept and whose generator is trained on.
    """
    if start is None:
        train_vae.train_vae(recipe.run(work, "codec"))
    else:
        resume.unpack(start, work)
    codec = train_vae.load_codec(work / "codec")
    for name, pieces, held_out in (
        ("corpus", recipe.pieces, False),
        ("held", recipe.held_out, True),
    ):
        if held_out:  # latents are scaled by the corpus' own spread
            (work / name).mkdir(exist_ok=True)
            shutil.copy(work / "corpus" / "scale.pt", work / name / "scale.pt")
        build_corpus(work / "codec", work / name, pieces, held_out)
    corpus, held = Corpus(work / "corpus"), Corpus(work / "held")
    if start is None:
        train_tokens.train_tokens(recipe.run(work, "tokens"), corpus, held, recipe.sizes)
    codes = train_tokens.load_codes(work / "tokens", recipe.sizes)
    words = text_tokenizer(work / "text_tokenizer")
    silence = silence_latent(encode_silence(codec, corpus.scale))
    train_generator.train_generator(
        recipe.run(work, "generator"), corpus, held, codes, words, silence, recipe.sizes,
        recipe.lengths,
    )  # fmt: skip
    ids = tuple(
        planner.encode_codes(codes, part, work / name)
        for part, name in ((corpus, "corpus"), (held, "held"))
    )
    speech = planner.planner_tokenizer(work / "planner_tokenizer", CODE_COUNT)
    sounds = planner.sound_of_codes(codes, CODE_COUNT, planner.WIDTH)
    planner.train_planner(recipe.run(work, "planner"), corpus, held, ids, speech, sounds)
    finish(work, vendor, recipe)


def finish(work: Path, vendor: Path, recipe: Recipe) -> None:
    """Writes the checkpoint from the stages' last states; the planner may be missing."""
    corpus = Corpus(work / "corpus")
    codec = train_vae.load_codec(work / "codec")
    silence = silence_latent(encode_silence(codec, corpus.scale))
    words = text_tokenizer(work / "text_tokenizer")
    generator = train_generator.load_generator(work / "generator", words, recipe.sizes, silence)
    codes = train_tokens.load_codes(work / "tokens", recipe.sizes)
    planning = speech = None
    if (work / "planner" / "last.ckpt").exists():
        speech = planner.planner_tokenizer(work / "planner_tokenizer", CODE_COUNT)
        planning = planner.load_planner(work / "planner", speech)
    write(vendor, assemble(codec, corpus.scale, codes, generator, words), planning, speech)
    print("{} parameters, {} bytes".format(*check_limits(vendor)))


def report(work: Path, vendor: Path, count: int, steps: int, guidance: float, shift: float) -> None:
    """Measures every gate, writes `report.json`, `report.md` and the spectrograms of eight songs."""
    results, sounds = evaluation.run(vendor, count, steps, guidance, shift)
    if (vendor / "planner").exists() and list((work / "held").glob("codes-*.npy")):
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        speech = PreTrainedTokenizerFast.from_pretrained(vendor / "planner")
        model = AutoModelForCausalLM.from_pretrained(vendor / "planner", dtype=torch.float32).eval()
        held = Corpus(work / "held")
        results += planner_eval.planning_gates(model, speech, evaluation.held_out_pieces(count))
        results += planner_eval.listening_gates(
            model, speech, held, planner.read_codes(held, work / "held"), min(count, len(held))
        )
    work.mkdir(parents=True, exist_ok=True)
    (work / "report.json").write_text(json.dumps(evaluation.as_json(results), indent=1) + "\n")
    (work / "report.md").write_text(evaluation.table(results) + "\n")
    draw_spectrograms(sounds[:8], evaluation.held_out_pieces(8), work / "songs.png")
    print(evaluation.table(results))


def write_card(work: Path, vendor: Path) -> None:
    """The model card: what stays the same, the measured gates, and the pictures."""
    parameters, size = check_limits(vendor)
    card = (Path(__file__).parent / "card.md").read_text()
    numbers = f"## Measured\n{parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB.\n\n"
    pictures = ["\n## Pictures\n"]
    for name, source, title in (
        ("songs.png", work / "songs.png", "The first eight of the prompts above"),
        ("curves.png", work / "generator" / "curves.png", "Training of the DiT (held out: dashed)"),
    ):
        if source.exists():
            shutil.copy(source, vendor / name)
            pictures.append(f"![{title}]({name})\n")
    (vendor / "README.md").write_text(
        card + numbers + (work / "report.md").read_text() + "\n".join(pictures)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mini", description=__doc__)
    parser.add_argument("stage", choices=("make", "export", "report", "card"))
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "mini")
    parser.add_argument("--vendor", type=Path, default=ROOT / "vendor" / "ace-step-mini")
    parser.add_argument(
        "--small", action="store_true", help="a run of minutes that only proves the machinery"
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="a finished checkpoint to go on from: codec and codes stay as they are",
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=3.0)
    args = parser.parse_args()
    recipe = SMALL if args.small else FULL
    if args.stage == "make":
        make(args.work, args.vendor, recipe, args.start)
    elif args.stage == "export":
        finish(args.work, args.vendor, recipe)
    elif args.stage == "card":
        write_card(args.work, args.vendor)
    else:
        report(args.work, args.vendor, args.prompts, args.steps, args.guidance, args.shift)


if __name__ == "__main__":
    main()
