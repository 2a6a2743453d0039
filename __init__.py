"""cviv-vae: CV-VAE and IV-VAE for ComfyUI. Nothing is imported until ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():  # noqa: ANN201, the type lives in ComfyUI
    """The extension, as ComfyUI asks for it when it loads the pack."""
    from .nodes import Extension

    return Extension()
