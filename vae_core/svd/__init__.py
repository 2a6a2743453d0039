"""SVD's output adapter: its file, its arithmetic, its training, and the U-Net through diffusers (`svd.unet`)."""

from .adapter import LAYER, OUTPUTS, OutputLayer, output_layer, read_adapter, save_adapter
from .scenes import MOTION, beginning_of, look_through, spans_of
from .session import CHECKPOINT_EVERY, HELD_OUT, Encode, Training, TrainingClip, with_buckets
from .trainer import LATENT_SCALE, METHODS, AdapterTrainer, Draw, TrainSettings, network_target

__all__ = [
    "CHECKPOINT_EVERY",
    "HELD_OUT",
    "LATENT_SCALE",
    "LAYER",
    "METHODS",
    "MOTION",
    "OUTPUTS",
    "AdapterTrainer",
    "Draw",
    "Encode",
    "OutputLayer",
    "TrainSettings",
    "Training",
    "TrainingClip",
    "beginning_of",
    "look_through",
    "network_target",
    "output_layer",
    "read_adapter",
    "save_adapter",
    "spans_of",
    "with_buckets",
]
