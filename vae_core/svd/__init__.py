"""SVD's output adapter: its file, its arithmetic, its training, and the U-Net through diffusers (`svd.unet`)."""

from .adapter import LAYER, OUTPUTS, OutputLayer, output_layer, read_adapter, save_adapter
from .session import CHECKPOINT_EVERY, HELD_OUT, MOTION, Training, TrainingClip, augmented
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
    "OutputLayer",
    "TrainSettings",
    "Training",
    "TrainingClip",
    "augmented",
    "network_target",
    "output_layer",
    "read_adapter",
    "save_adapter",
]
