"""Nodes that encode and decode clips, and plan it."""
