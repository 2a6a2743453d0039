"""Layers, operators and regions that families share; knows no family, no plan and no file."""
