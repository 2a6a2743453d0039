"""Nodes for latents: files, layout, joining."""
