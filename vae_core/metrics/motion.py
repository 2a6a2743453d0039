"""Motion between two frames: dense optical flow by OpenCV, and frames moved by it."""

import importlib
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 255.0
LEAST_SIDE = 16  # pixels; OpenCV finds no flow in smaller frames
NO_OPENCV = (
    "Following the motion needs OpenCV, which this Python does not have. Install it with `pip install "
    "opencv-python-headless` in the Python that runs this program, and start it again."
)


def require_opencv() -> ModuleType:
    """OpenCV's module. Raises ValueError, with what to install, where it is missing."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise ValueError(NO_OPENCV) from error


def optical_flow(source: Tensor, target: Tensor) -> Tensor:
    """Where each pixel of `source` lies in `target`, as a shift (2, h, w) in pixels, x first. Both (3, h, w), 0..255.

    OpenCV's DIS flow of the grey pictures, on the CPU. A frame with a side below 16 pixels has no flow: zeros. Raises
    ValueError without OpenCV.
    """
    cv2 = require_opencv()
    if min(source.shape[-2:]) < LEAST_SIDE:
        return torch.zeros(2, *source.shape[-2:])
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    return torch.from_numpy(flow.calc(_grey(source), _grey(target), None)).permute(2, 0, 1)


def warp(image: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """(c, h, w): `image` at the places that `flow` (2, h, w) points to, bilinear or bicubic, the edge repeated."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([2 * (x + flow[0]) / max(width - 1, 1) - 1, 2 * (y + flow[1]) / max(height - 1, 1) - 1], -1)
    return F.grid_sample(image[None], places[None], mode=mode, padding_mode="border", align_corners=True)[0]


def luma(frame: Tensor) -> Tensor:
    """(h, w): the brightness of a frame (3, h, w), in the frame's own range. Weights of ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (frame * weights).sum(0)


def _grey(frame: Tensor) -> NDArray[np.uint8]:
    return luma(frame).round().clamp(0, LEVELS).byte().contiguous().numpy()
