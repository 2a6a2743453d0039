"""What docs/make_pictures.py takes pictures of."""

from __future__ import annotations

from typing import Any

# template -> picture in docs/, and whether it is run for it
GRAPHS = {
    "Reconstruct a video": ("graph_reconstruct", True),
    "Encode, edit, decode": ("graph_edit", True),
    "Long video to file": ("graph_long", True),
    "Compare CV-VAE and IV-VAE": ("graph_compare", True),
    "Decode an AnimateDiff or SD latent batch with CV-VAE": ("graph_animatediff", False),
    "SVD image to 97 frames": ("graph_svd", False),
}
# the node that a template is about, where it is not run: the first of these that is in it
SUBJECTS = (
    "CVIV_DecodeLoop",
    "CVIV_SVDChunkStore",
    "CVIV_SVDEndImage",
    "CVIV_SVDExtendClip",
    "CVIV_SVDLongVideo",
    "CVIV_DetailFusion",
    "FrameInterpolate",
    "CVIV_TrainSVDAdapter",
    "CVIV_DecodeToVideo",
)
# node -> template that it is taken from; and those in graphs of their own
OF_TEMPLATES = {
    "CVIV_LoadVideoVAE": "Reconstruct a video",
    "CVIV_DemoClip": "Reconstruct a video",
    "CVIV_Encode": "Reconstruct a video",
    "CVIV_DecodeToVideo": "Reconstruct a video",
    "CVIV_Decode": "Separate images or a clip",
    "CVIV_JoinLatents": "Join clips as latents",
    "CVIV_SaveVideoLatent": "Long video to file",
    "CVIV_DecodeLoop": "SVD ambient loop",
    "CVIV_SVDConditioning": "SVD 193 frames by windows",
    "CVIV_SVDLongVideo": "SVD 193 frames by windows",
    "CVIV_SVDChunkStore": "SVD chunks kept and made anew",
    "CVIV_SVDEndImage": "SVD from one image to another",
    "CVIV_SVDExtendClip": "SVD extend a clip",
    "CVIV_DetailFusion": "Sharp keyframes",
    "CVIV_TrainSVDAdapter": "Train an SVD adapter",
}
VAE = {"vae_name": "demo-cv-vae", "dtype": "auto", "device": "auto", "latent_layout": "auto"}
ENCODE = {"mode": "mean", "sample_seed": 0, "fps": 0.0, "memory_budget_gb": 0.0, "first_frame": 0, "frame_count": 9}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "vae": ("CVIV_LoadVideoVAE", VAE),
    "clip": ("CVIV_DemoClip", {}),
    "latent": ("CVIV_Encode", {"vae": ["vae", 0], "images": ["clip", 0], **ENCODE, "preview": True}),
    "images": ("CVIV_Decode", {"vae": ["vae", 0], "samples": ["latent", 0], "memory_budget_gb": 0.0, "preview": True}),
    "whole": ("GetVideoComponents", {"video": ["clip", 0]}),
    "nine": ("ImageFromBatch", {"image": ["whole", 0], "batch_index": 0, "length": 9}),
    "black": ("SolidMask", {"value": 0.0, "width": 320, "height": 192}),
    "white": ("SolidMask", {"value": 1.0, "width": 160, "height": 192}),
    "mask": ("MaskComposite", {"destination": ["black", 0], "source": ["white", 0], "x": 0, "y": 0,
                               "operation": "add"}),
    "info": ("CVIV_VideoVAEInfo", {"vae": ["vae", 0]}),
    "plan": ("CVIV_Plan", {"vae": ["vae", 0], "direction": "decode", "frames": 97, "width": 1024, "height": 576,
                           "memory_budget_gb": 6.0}),
    "layout": ("CVIV_LatentLayout", {"samples": ["latent", 0], "layout": "video 5-D", "clips": 1}),
    "composite": ("CVIV_Composite", {"original": ["nine", 0], "edited": ["images", 0], "mask": ["mask", 0],
                                     "feather": 16, "match_colour": False}),
    "sequence": ("CVIV_SaveImageSequence", {"video": ["composite", 0], "filename_prefix": "frames/video",
                                            "format": "PNG, 16 bits"}),
    "trip": ("CVIV_RoundTrip", {"vae": ["vae", 0], "video": ["clip", 0], "frame_count": 17, "memory_budget_gb": 0.0}),
    "compare": ("CVIV_Compare", {"video_a": ["nine", 0], "video_b": ["images", 0], "label_a": "original",
                                 "label_b": "CV-VAE (demo weights)", "frames": "must match", "fps": 0.0,
                                 "player_side": 768, "player_frames": 240}),
    "shown": ("PreviewImage", {"images": ["composite", 1]}),
}  # fmt: skip
# nodes that are seen as they come, without a run
AS_THEY_COME = {
    "CVIV_ApplySVDAdapter": {"adapter": "svd_cv_vae.safetensors", "strength": 1.0, "precise": True},
    "CVIV_AnimatedSamplingPreview": {"show": "contact sheet", "every": 2, "colours": "auto", "fps": 8.0, "side": 768,
                                     "most_frames": 64},
    "CVIV_LoadVideoLatent": {"first_latent": 0, "latent_count": 0, "layout": "as saved"},
}  # fmt: skip
