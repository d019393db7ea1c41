"""Pictures of sounds for the report and the model card."""

from pathlib import Path

import numpy as np

from mini.compose import Piece
from mini.measure import spectrogram


def draw_spectrograms(
    sounds: list[tuple[np.ndarray, int]], pieces: list[Piece], path: Path
) -> None:
    """Log spectrograms of (samples (2, n), rate) up to 8 kHz, two columns, titled by the request."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(sounds) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 2.1 * rows), squeeze=False)
    for axis, (sound, rate), piece in zip(axes.flat, sounds, pieces, strict=False):
        magnitudes, bins = spectrogram(sound, rate, 4096, 512)
        kept = (bins > 40) & (bins < 8000)
        level = 20 * np.log10(magnitudes[kept] + 1e-6)
        seconds = np.arange(level.shape[1]) * 512 / rate
        axis.pcolormesh(
            seconds, bins[kept], level, vmin=level.max() - 75, vmax=level.max(), cmap="magma"
        )
        axis.set_yscale("log")
        axis.set_title(f"{piece.style}, {piece.bpm} bpm, {piece.key}", fontsize=8)
        axis.tick_params(labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)
