"""A job's adapters: judged before it waits, kept in its folder, hung on the engine for its song."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakKeyDictionary

from core import files
from core.errors import StudioError
from core.params import AdapterRef
from core.results import AdapterInfo, Progress
from models import adapter_files, adapter_layers, catalog, checkpoints
from models.acestep import Engine
from runtime.job import Job
from runtime.uploads import link, plain

CONFIG, SUFFIX = "adapter_config.json", ".safetensors"


_stacks: WeakKeyDictionary[Engine, adapter_layers.AdapterStack] = WeakKeyDictionary()


def judge(worn: AdapterRef, model: catalog.Model) -> adapter_files.Adapter:
    """Judge an adapter by its header, and against `model` where that is on disk.

    Raises:
        StudioError: `adapter-missing`, `adapter-unreadable`, `adapter-too-big`, `adapter-refused`,
            `adapter-wrong-base`.
    """
    adapter = adapter_files.inspect(worn.file, worn.config)
    if there := _layers(model):
        adapter_layers.check_fit(adapter, there, model.title)
    return adapter


def seen(adapter: adapter_files.Adapter) -> AdapterInfo:
    """What a person wants to know of an adapter that was judged."""
    return AdapterInfo(
        name=adapter.name,
        rank=adapter.rank,
        modules=len(adapter.deltas),
        size_bytes=adapter.path.stat().st_size,
        notes=adapter.notes,
    )


def dressed(job: Job) -> Job:
    """The job with the adapters of its request judged, and kept as its own.

    Linked or copied into its folder, each with its settings beside it, so that a retake finds them
    whatever the visitor deletes.

    Raises:
        StudioError: those of `judge`; `disk-full`, `not-writable`.
    """
    mine, judged, notes = [], [], list(job.notes)
    for i, worn in enumerate(job.request.adapters):
        adapter = judge(worn, job.model)
        kept = job.folder / "adapters" / str(i) / plain(adapter.name)
        weights = kept / adapter.path.name
        if not worn.file.is_dir():  # settings beside it count only for what is called so
            weights = kept = kept.with_name(kept.name.removesuffix(SUFFIX) + SUFFIX)
        try:
            weights.parent.mkdir(mode=0o700, parents=True)
            link(adapter.path, weights)
            if adapter.config:
                weights.with_name(CONFIG).write_bytes(adapter.config)
        except FileNotFoundError as error:
            raise StudioError("adapter-missing", name=adapter.name) from error
        except OSError as error:
            raise files.write_error(job.folder, error, adapter_files.MAX_FILE_BYTES) from error
        mine.append(AdapterRef(file=kept, strength=worn.strength))
        judged.append((replace(adapter, path=weights), worn.strength))
        notes += adapter.notes
    return replace(
        job,
        request=job.request.model_copy(update={"adapters": tuple(mine)}),
        adapters=tuple(judged),
        notes=tuple(notes),
    )


def play(job: Job, engine: Engine) -> Iterator[Progress]:
    """Let the job's adapters play in `engine`, and no others; what plays is returned.

    Raises:
        StudioError: those of `stack.AdapterStack.apply`.
    """
    if engine not in _stacks and job.adapters:
        _stacks[engine] = adapter_layers.AdapterStack(engine.pipe.transformer, job.model.title)
    return (yield from _stacks[engine].apply(job.adapters)) if engine in _stacks else ()


def _layers(model: catalog.Model) -> dict[str, tuple[int, int]]:
    """The layers of `model` that can be adapted; none while they cannot be told."""
    folder = checkpoints.locate(model)
    if folder is None:
        return {}
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
        return adapter_layers.shapes(config)
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # loading it will say what is wrong
