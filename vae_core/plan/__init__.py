"""What would run: memory, work and the choice of plans."""
