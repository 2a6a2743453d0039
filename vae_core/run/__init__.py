"""A clip of any length through a network, in bounded memory."""
