"""Images of what the offsets do."""
