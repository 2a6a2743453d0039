"""Pictures of plans and of losses, with Pillow."""

from .losses import draw_losses
from .plan import draw_plan

__all__ = ["draw_losses", "draw_plan"]
