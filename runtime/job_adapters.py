"""The adapters of a request: checked, and copied into the job's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core import files
from core.errors import StudioError
from core.params import AdapterRef
from core.results import AdapterInfo
from models import adapter_files, adapter_layers, catalog, checkpoints
from runtime.job import JobFolder
from runtime.uploads import link

CONFIG, SUFFIX = "adapter_config.json", ".safetensors"


def judge(reference: AdapterRef, model: catalog.Model) -> adapter_files.Adapter:
    """Check an adapter by its header, and against `model` where that is on disk.

    Raises:
        StudioError: `adapter-missing`, `adapter-unreadable`, `adapter-too-big`, `adapter-refused`,
            `adapter-wrong-base`.
    """
    adapter = adapter_files.inspect(reference.file, reference.config)
    if there := _layers(model):
        adapter_layers.check_fit(adapter, there, model.title)
    return adapter


def info(adapter: adapter_files.Adapter) -> AdapterInfo:
    """What the page shows of a checked adapter."""
    return AdapterInfo(
        name=adapter.name,
        rank=adapter.rank,
        modules=len(adapter.deltas),
        size_bytes=adapter.path.stat().st_size,
        notes=adapter.notes,
    )


def copy_into(
    folder: JobFolder, adapters: Sequence[AdapterRef], model: catalog.Model, notes: list[str]
) -> tuple[tuple[AdapterRef, ...], tuple[tuple[adapter_files.Adapter, float], ...]]:
    """Check the adapters of a request, and keep them in the job's folder.

    Each is linked or copied with its configuration beside it, so that a retake finds it whatever
    the visitor deletes.

    Args:
        notes: gets what has to be said about the adapters.

    Returns:
        References to the copies, and the checked adapters with their strengths.

    Raises:
        StudioError: those of `judge`; `disk-full`, `not-writable`.
    """
    references, checked = [], []
    for i, reference in enumerate(adapters):
        adapter = judge(reference, model)
        copy = folder.path / "adapters" / str(i) / files.safe_name(adapter.name, "adapter")
        weights = copy / adapter.path.name
        if not reference.file.is_dir():  # the configuration beside it must have the same stem
            weights = copy = copy.with_name(copy.name.removesuffix(SUFFIX) + SUFFIX)
        try:
            weights.parent.mkdir(mode=0o700, parents=True)
            link(adapter.path, weights)
            if adapter.config:
                weights.with_name(CONFIG).write_bytes(adapter.config)
        except FileNotFoundError as error:
            raise StudioError("adapter-missing", name=adapter.name) from error
        except OSError as error:
            raise files.write_error(folder.path, error, adapter_files.MAX_FILE_BYTES) from error
        references.append(AdapterRef(file=copy, strength=reference.strength))
        checked.append((replace(adapter, path=weights), reference.strength))
        notes += adapter.notes
    return tuple(references), tuple(checked)


def _layers(model: catalog.Model) -> dict[str, tuple[int, int]]:
    """The layers of `model` that can be adapted; empty while its configuration is unreadable."""
    folder = checkpoints.locate(model)
    if folder is None:
        return {}
    try:
        return adapter_layers.shapes(checkpoints.transformer_config(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # loading it will say what is wrong
