"""The errors that users see: every one a ValueError whose text says what was got, what is allowed and what to do."""


class CheckpointError(ValueError):
    """A weight file or state dict that cannot be used."""


class LatentFileError(ValueError):
    """A latent file that cannot be read or written."""


class VideoError(ValueError):
    """A video file that cannot be read or written."""
