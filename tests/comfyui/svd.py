"""A diffusion model of SVD's kind with 3.5 million random parameters, for samplers."""

from __future__ import annotations

from typing import Any

import torch

from .inprocess import Comfy

UNET = {
    "image_size": 32,
    "out_channels": 4,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 8,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "adm_in_channels": 768,
    "num_classes": "sequential",
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "disable_temporal_crossattention": False,
}


def small_svd(comfy: Comfy, heads: int = 32) -> Any:
    """A MODEL that ComfyUI takes for SVD. heads: channels of an attention head."""
    management = comfy.module("comfy.model_management")
    config = comfy.module("comfy.supported_models").SVD_img2vid(dict(UNET))
    config.unet_config["num_head_channels"] = heads  # the constructor sets that of the full model
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        else:
            drawn = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(drawn)
    model.diffusion_model.requires_grad_(False).train(False)
    return comfy.module("comfy.model_patcher").ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
