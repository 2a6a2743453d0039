"""Video, sound and latent files."""
