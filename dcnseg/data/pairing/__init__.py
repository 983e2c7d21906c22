"""Which image belongs to which mask, and to which split."""
