"""The public door: `VideoVAE`, `load` and `save`."""
