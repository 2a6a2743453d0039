"""Nodes for longer SVD videos."""
