"""Train SVD Output Adapter: the last convolution of SVD, tuned on clips of a folder."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.families import VIDEO
from ...vae_core.pictures import draw_losses
from ...vae_core.svd import (
    CHECKPOINT_EVERY,
    HELD_OUT,
    LAYER,
    METHODS,
    AdapterTrainer,
    Draw,
    Encode,
    Training,
    TrainingClip,
    TrainSettings,
    network_target,
    save_adapter,
)
from ...vae_core.svd.files import check_size, fingerprint
from ..bridge.native import NativeVideoVAE, require
from ..bridge.running import report_ui, show_text
from ..bridge.schema import before_run, check_choice, describe, field
from ..bridge.wire import image_of
from .adapter import FOLDER, added_outputs, checkpoint_layer
from .anchor import may_be_svds
from .clips import ClipMaker, files_of, training_folder
from .model import check_svd
from .names import check_name

_log = logging.getLogger("cviv-vae")


class TrainSVDAdapter(io.ComfyNode):
    """Videos in, an adapter file out; memory as for sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_TrainSVDAdapter",
            display_name="Train SVD Output Adapter",
            description="Tunes the last convolution of SVD (11,524 numbers) on CV-VAE latents of your clips, so that "
            "SVD makes latents for 4 times as many frames. Nothing runs backwards through the model: it needs the "
            "memory of sampling. Cancel keeps what was done.",
            search_aliases=["svd training", "finetune svd", "train adapter", "svd lora training"],
            inputs=[*_model_inputs(), *_training_inputs(), *_clip_inputs()],
            outputs=[
                io.String.Output(display_name="path", tooltip="Path of the adapter file, in models/loras."),
                io.Image.Output(display_name="loss curve", tooltip="Loss of every step; also saved as PNG."),
                io.String.Output(display_name="report", tooltip="Clips, steps, time, and loss before and after."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, save_name: str | None = None, folder: str | None = None) -> bool | str:
        return before_run((_check_save_name, save_name), (training_folder, folder))

    @classmethod
    def execute(
        cls,
        model: Any,
        clip_vision: Any,
        image_vae: Any,
        vae: Any,
        folder: str,
        steps: int,
        method: str,
        learning_rate: float,
        seed: int,
        save_name: str,
        resume: bool,
        frames: int,
        width: int,
        height: int,
        ridge: float,
    ) -> io.NodeOutput:
        check_choice("method", method, METHODS)
        check_size(width, height)
        _check_models(model, clip_vision, image_vae, vae)
        files = files_of(folder)
        places = Places.of(save_name, resume)
        settings = TrainSettings(
            method=method,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            ridge=ridge,
            seed=seed,
            fingerprint=fingerprint(files, frames, width, height),
        )
        old, device = checkpoint_layer(model), model.load_device
        if places.state.exists():
            trainer = AdapterTrainer.resume(places.state, old, settings, device)
        else:
            trainer = AdapterTrainer(old, settings, device)
        maker = ClipMaker(
            vae=vae, image_vae=image_vae, clip_vision=clip_vision, frames=frames, width=width, height=height
        )
        node_id = cls.hidden.unique_id
        clips, notes = maker.clips(files, node_id)
        session = Session(model, trainer, clips, maker.encode, places, node_id)
        path, curve, report = session.run(steps, notes)
        return io.NodeOutput(path, curve, report, ui=report_ui(report))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the files of a training lie."""

    adapter: Path
    state: Path
    curve: Path

    @classmethod
    def of(cls, name: str, resume: bool) -> Places:
        """Those of `name`, in folders that exist. Raises ValueError for a name that is taken, unless it is resumed."""
        _check_save_name(name)
        adapters = Path(folder_paths.get_folder_paths(FOLDER)[0])
        kept = Path(folder_paths.get_output_directory()) / "adapters"
        places = cls(
            adapter=adapters / f"{name}.safetensors",
            state=kept / f"{name}.state.safetensors",
            curve=kept / f"{name}.png",
        )
        for path in (places.adapter, places.state):
            if path.exists() and not (resume and places.state.exists()):
                raise ValueError(
                    f"There is already {path.name} in {path.parent.name}/: choose another save_name, or switch resume "
                    "on to go on with that training (its state lies in output/adapters)."
                )
        for made in (adapters, kept):
            made.mkdir(parents=True, exist_ok=True)
        return places


class Session:
    """One run of a training: progress, cancel, files and report."""

    def __init__(
        self,
        model: Any,
        trainer: AdapterTrainer,
        clips: list[TrainingClip],
        encode: Encode,
        places: Places,
        node_id: str | None,
    ) -> None:
        self._model, self._trainer, self._places, self._node_id = model, trainer, places, node_id
        self._training = Training(trainer, clips, self._features, self._encode)
        self._make_image, self._loaded = encode, False

    def run(self, steps: int, notes: list[str]) -> tuple[str, Tensor, str]:
        """Train up to `steps` steps in all; (path, IMAGE of the loss curve, report)."""
        trainer, training, places, began = self._trainer, self._training, self._places, time.monotonic()
        bar = comfy.utils.ProgressBar(max(steps - trainer.steps, 0) + HELD_OUT, node_id=self._node_id)
        try:
            for loss in training.steps(steps):
                bar.update(1)
                self._say(f"step {trainer.steps} of {steps}, loss {loss:.4g}")
                if trainer.steps % CHECKPOINT_EVERY == 0:
                    trainer.save(places.state)
        finally:  # a cancel is a BaseException in newer versions
            if trainer.steps > training.first:
                trainer.save(places.state)
        tuned = trainer.result()
        before, after = training.compare(tuned, lambda: bar.update(1))
        picture = draw_losses(trainer.losses, training.title(places.adapter.stem, before, after))
        picture.save(places.curve)
        training.check(before, after, f"output/adapters/{places.state.name}")
        save_adapter(places.adapter, tuned - trainer.old, training.texts(before, after))
        kept = f"adapter {places.adapter.name} in models/loras; state and loss curve in output/adapters"
        report = "\n".join(training.report(before, after, time.monotonic() - began, kept, notes))
        _log.info("%s", report.replace("\n", "; "))
        return str(places.adapter), image_of(picture), report

    def _encode(self, picture: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        self._loaded = False  # the image VAE may have taken the place of the model
        return self._make_image(picture)

    def _features(self, clip: TrainingClip, drawn: Draw, image: Tensor) -> tuple[Tensor, Tensor]:
        mm.throw_exception_if_processing_interrupted()
        if not self._loaded:
            needed = self._model.memory_required(list(clip.x0.shape))
            mm.load_models_gpu([self._model], memory_required=needed)
            self._loaded = True
        return network_features(self._model, clip, drawn, image)

    def _say(self, text: str) -> None:
        if self._node_id is not None:
            show_text(text, self._node_id)


def network_features(model: Any, clip: TrainingClip, drawn: Draw, image: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the output layer of a loaded SVD (t, features, h, w), and what it should give (t, 4, h, w)."""
    network, device = model.model, model.load_device
    x0, noise, frames = clip.x0.to(device), drawn.noise.to(device), clip.x0.shape[0]
    image, seen = (torch.zeros_like(t) if drawn.dropped else t for t in (image, clip.seen))
    caught: list[Tensor] = []

    def catch(_: Any, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0].detach())

    handle = network.diffusion_model.out[2].register_forward_pre_hook(catch)
    try:
        with torch.inference_mode():  # nothing is kept for a way back
            told = network.encode_adm(fps=clip.rate, motion_bucket_id=clip.bucket, augmentation_level=drawn.level)
            network.apply_model(
                x0 + drawn.sigma * noise,
                torch.full((frames,), drawn.sigma, device=device),
                c_concat=image.to(device).expand(frames, -1, -1, -1),
                c_crossattn=seen.to(device).expand(frames, -1, -1),
                y=told.to(device).expand(frames, -1),
                num_video_frames=frames,
                transformer_options={},
            )
            return caught[0], network_target(x0, noise, drawn.sigma)
    finally:
        handle.remove()


def _check_save_name(name: str) -> None:
    check_name("save_name", name, "svd_cv_vae_97", "it is not a path, and the ending is added")


def _check_models(model: Any, clip_vision: Any, image_vae: Any, vae: Any) -> None:
    """Raise ValueError for models that cannot be trained together."""
    check_svd(model)
    if added_outputs(model) or any(name.startswith(LAYER) for name in model.patches):
        raise ValueError(
            "The output layer of this model is already changed, by an adapter or a LoRA: connect the model straight "
            "from Image Only Checkpoint Loader. To go on with a training, switch resume on."
        )
    if clip_vision is None:
        raise ValueError(
            "There is no CLIP vision model: load an SVD checkpoint with Image Only Checkpoint Loader, or a CLIP vision "
            "file (ViT-H) with Load CLIP Vision."
        )
    require(vae)
    for name, one in (("vae", vae), ("image_vae", image_vae)):
        if isinstance(one, NativeVideoVAE) and not may_be_svds(one):
            raise ValueError(
                f"The input {name} is {one.codec.family}, whose latent space is not SVD's: load a CV-VAE with 4 "
                "channels."
            )
    if vae.compression != VIDEO:
        raise ValueError(
            f"The input vae is {vae.codec.family}, which makes a latent of every frame: load the CV-VAE that will "
            "decode what SVD makes."
        )


def _model_inputs() -> list[Any]:
    return [
        field(io.Model, "model", tooltip="The SVD model to tune, straight from Image Only Checkpoint Loader."),
        field(io.ClipVision, "clip_vision", tooltip="From Image Only Checkpoint Loader."),
        field(io.Vae, "image_vae", tooltip="SVD's own VAE, from Image Only Checkpoint Loader: for the first frames."),
        field(io.Vae, "vae", tooltip="The CV-VAE that will decode what SVD makes, from Load Video VAE."),
        field(
            io.String,
            "folder",
            default="svd_training",
            tooltip="A folder in input/ with videos, or latent files of Save Video Latent made with this VAE.",
        ),
    ]


def _training_inputs() -> list[Any]:
    return [
        field(
            io.Int,
            "steps",
            default=500,
            min=1,
            max=10**6,
            tooltip="Steps in all, each one pass of the model over one clip. Ridge regression needs a few dozen for "
            "each clip at most; the published tuning by gradient descent took 5000.",
        ),
        field(
            io.Combo,
            "method",
            options=list(METHODS),
            default=METHODS[0],
            tooltip="ridge regression: gathers sums in every step and solves for the best weights at the end; no "
            "learning rate. gradient descent: AdamW, as published; needs thousands of steps.",
        ),
        field(
            io.Float,
            "learning_rate",
            default=1e-5,
            min=1e-8,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="gradient descent: published is 0.00001.",
        ),
        field(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=2**40,
            tooltip="Of clips, noise levels and noise. The same seed gives the same training.",
        ),
        field(
            io.String,
            "save_name",
            default="svd_cv_vae",
            tooltip="Name of the adapter file in models/loras, without ending. A name that is there is not replaced.",
        ),
        field(
            io.Boolean,
            "resume",
            default=False,
            tooltip="Go on with the training of this name, cancelled or done, up to the steps above.",
        ),
    ]


def _clip_inputs() -> list[Any]:
    return [
        field(
            io.Int,
            "frames",
            default=97,
            min=5,
            max=1025,
            step=4,
            tooltip="Frames of a clip: 97 are the 25 latents of SVD-XT. Longer videos give several clips.",
            advanced=True,
        ),
        field(io.Int, "width", default=1024, min=64, max=4096, step=64, tooltip="Of the videos.", advanced=True),
        field(io.Int, "height", default=576, min=64, max=4096, step=64, tooltip="Of the videos.", advanced=True),
        field(
            io.Float,
            "ridge",
            default=0.001,
            min=1e-9,
            max=1e6,
            step=0.001,
            round=False,
            tooltip="ridge regression: how strongly the weights are held at the old ones; more for few clips.",
            advanced=True,
        ),
    ]


NODES = [TrainSVDAdapter]
