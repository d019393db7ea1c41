"""One way to run every training here: Lightning, resumable from its folder, curves as a picture."""

import csv
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.optim.swa_utils import AveragedModel

PROCESSES = 2  # on a CPU: one thread each, averaging gradients, stall less than threads of one


class Trained(pl.LightningModule):
    """A model with a moving average of its weights, AdamW, warm-up and a cosine to five percent.

    Subclasses set `self.model`, call `self.start_average()` and implement `loss(model, batch)`,
    which returns the loss and a dict of numbers to log.
    """

    def __init__(
        self, steps: int, rate: float, warmup: int = 100, decay: float = 0.0, average: float = 0.998
    ):
        super().__init__()
        self.steps, self.rate, self.warmup, self.decay = steps, rate, warmup, decay
        self.average_decay = average

    def start_average(self) -> None:
        self.average = AveragedModel(self.model, multi_avg_fn=self._mix)
        self.average.requires_grad_(False)

    def _mix(self, averages: list, weights: list, count: int) -> None:
        """Moves the averages towards the weights; the memory grows with the steps averaged."""
        done = int(count)
        decay = min(self.average_decay, (1 + done) / (10 + done))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def training_step(self, batch: object, _: int) -> torch.Tensor:
        loss, numbers = self.loss(self.model, batch)
        self.log_dict({"loss": loss.detach(), **numbers})
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        if self.global_step < self.warmup:  # the average begins where warm-up ends
            self.average.n_averaged.zero_()
        self.average.update_parameters(self.model)

    def on_train_end(self) -> None:
        keeper = self.trainer.checkpoint_callback
        self.trainer.save_checkpoint(Path(keeper.dirpath) / "last.ckpt")

    def validation_step(self, batch: object, _: int) -> None:
        _, numbers = self.loss(self.average.module, batch)
        self.log_dict({f"held_{name}": value for name, value in numbers.items()}, batch_size=1)

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98))

        def factor(step: int) -> float:
            done = torch.tensor(min(1.0, step / self.steps))
            return min(1.0, (step + 1) / self.warmup) * (
                0.525 + 0.475 * torch.cos(torch.pi * done).item()
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Run:
    """One training: the folder of its state, its steps, samples a batch in each process."""

    folder: Path
    steps: int
    batch: int
    processes: int = PROCESSES

    def resumed(self) -> int:
        """How often it was started before: a resumed run does not see the same batches again."""
        return len(list(self.folder.glob("log*")))


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 itself; one that doesn't is slower with it."""
    features = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or bool(
        features.get("amx_bf16") or features.get("avx512_bf16")
    )


def rank() -> int:
    """Number of this process among those that train together."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def fit(
    module: Trained,
    train: object,
    held_out: object,
    run: Run,
    clip: float = 1.0,
    check_every: int = 250,
) -> None:
    """Trains to `module.steps`, resuming from the folder's last checkpoint where there is one."""
    folder, processes = run.folder, 1 if torch.cuda.is_available() else run.processes
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    check_every = min(check_every, module.steps)
    keeper = ModelCheckpoint(
        folder,
        "{step}",
        save_last=True,
        enable_version_counter=False,
        save_top_k=1,
        every_n_train_steps=check_every,
    )
    trainer = pl.Trainer(
        max_steps=module.steps,
        accelerator="auto",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        precision="bf16-mixed" if bfloat16_is_fast() else "32-true",
        gradient_clip_val=clip,
        val_check_interval=check_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=min(50, module.steps),
        logger=CSVLogger(folder, name="", version=f"log{len(list(folder.glob('log*')))}"),
        callbacks=[keeper, TQDMProgressBar(refresh_rate=50)],
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module, train, held_out, ckpt_path=str(last) if last.exists() else None, weights_only=False
    )
    draw_curves(folder)


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged number of a run, over all its resumptions: name -> [(step, value)]."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("log*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if name not in ("step", "epoch") and value:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def draw_curves(folder: Path) -> Path:
    """Writes `curves.png`: each number of the run over its steps, held-out ones dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = read_log(folder)
    names = sorted({name.removeprefix("held_") for name in curves})
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.4 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, style in ((name, "-"), (f"held_{name}", "--")):
            if label in curves:
                axis.plot(*zip(*curves[label], strict=True), style, label=label, linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    path = folder / "curves.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
