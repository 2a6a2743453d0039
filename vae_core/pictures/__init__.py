"""Pictures of plans and of losses, with Pillow."""
