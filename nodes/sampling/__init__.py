"""Nodes around a sampler."""
