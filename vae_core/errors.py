"""The errors a user can cause: each is a `ValueError` whose text says what was got, what is allowed and what to do."""

__all__ = ["AdapterError", "BudgetError", "CheckpointError", "LatentFileError", "VideoError"]


class AdapterError(ValueError):
    """SVD's output layer cannot be tuned: clips or a size that do not fit, or a result that would harm."""


class BudgetError(ValueError):
    """Work does not fit the memory that it may take; nothing was begun."""


class CheckpointError(ValueError):
    """A weight file, folder or state dict cannot be used: missing, damaged, unsafe to read, or not of our families."""


class LatentFileError(ValueError):
    """A latent file cannot be read or written: not a latent file, damaged, or in disagreement with its own metadata."""


class VideoError(ValueError):
    """A video cannot be read or written: missing, not a video, damaged, without pictures, or no codec for it."""
