"""The check that every SVD node makes of its model."""

from __future__ import annotations

from typing import Any

import comfy.model_base


def check_svd(model: Any) -> None:
    """Raise ValueError unless `model` is an SVD model."""
    network = getattr(model, "model", None)
    if not isinstance(network, comfy.model_base.SVD_img2vid):
        raise ValueError(
            f"The model is {type(network).__name__} and this node works on SVD (SVD_img2vid) alone: load "
            "svd.safetensors or svd_xt.safetensors with Image Only Checkpoint Loader. Other video models have "
            "context windows and adapters of their own."
        )
