"""Pictures of what the offsets do."""
