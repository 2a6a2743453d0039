"""Training: an image VAE, its inflation into a video VAE, and the video stage."""
