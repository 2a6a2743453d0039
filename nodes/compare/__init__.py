"""Nodes that show what a VAE loses, and give detail back."""
