"""SVD's output adapter: its file, its arithmetic, its training, and the U-Net through diffusers."""
