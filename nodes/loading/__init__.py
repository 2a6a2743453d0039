"""Nodes that load a VAE and say what it is."""
