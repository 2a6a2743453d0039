"""The same job on Ray Data: one machine with several workers or GPUs, or a cluster whose machines share the folders.

Every worker holds a VAE and leaves finished clips in the folder, as the job in one process does. So a worker or a
machine that is lost costs the clip it was at: Ray runs its task again, and what is there is not done again.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .job import Counts, EncodeJob, EncodeJobError, EncodeSettings, PlannedClip, Progress, encode_row

_MOST_TASKS = 2000


class _Encoder:
    """Lives in a worker."""

    def __init__(self, settings: EncodeSettings, device: str) -> None:
        self._settings = settings
        self._vae = settings.load(device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part, packed in zip(batch["part"], batch["clip"], strict=True):
            clip: PlannedClip = pickle.loads(packed)
            encode_row(self._vae, clip.file, clip.key, Path(part), self._settings)
        return {"id": batch["id"]}


def run_on_ray(
    job: EncodeJob, *, device: str, workers: int, address: str | None = None, progress: Progress | None = None
) -> Counts:
    """`job.run` on Ray with so many workers, each with one GPU where `device` is cuda, else with one core.

    address: of a cluster ("auto" finds the one that this machine belongs to), on which weights, sources and folder have
    the same paths everywhere; None starts Ray on this machine alone and stops it in the end.
    Raises EncodeJobError where Ray is not installed.
    """
    ray, clips = _ray(), job.pending()
    started = not ray.is_initialized()
    try:
        if clips:
            if started:
                # without an address, a worker for each core or GPU that is asked for, and nothing that listens outside
                local: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
                options = local if address is None else {"address": address}
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
            for identity in _encoded(job, clips, device, workers):
                job.finished(identity, progress)
        job.complete()
    finally:
        job.write_manifest()
        if started and ray.is_initialized():
            ray.shutdown()
    return job.counts()


def _ray() -> Any:  # noqa: ANN401 - an optional package
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise EncodeJobError(
            'Ray is not installed: pip install -e ".[distributed]" in the folder of cviv-vae, or leave --ray out.'
        ) from error


def _encoded(job: EncodeJob, clips: list[PlannedClip], device: str, workers: int) -> Iterator[str]:
    """The ids of clips, as they are done."""
    ray = _ray()
    on_gpu = device.startswith("cuda")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says at length what it runs
    items = [{"id": clip.id, "part": os.fspath(job.part(clip).resolve()), "clip": pickle.dumps(clip)} for clip in clips]
    # Ray starts workers that died again, without limit, and runs their tasks again
    done = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_TASKS)).map_batches(
        _Encoder,
        fn_constructor_kwargs={"settings": job.settings, "device": "cuda" if on_gpu else device},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        num_gpus=1 if on_gpu else None,  # the worker sees no other
        num_cpus=None if on_gpu else 1,
    )
    for row in done.iter_rows():
        yield str(row["id"])
