"""Which picture belongs to which mask, and to which split."""
