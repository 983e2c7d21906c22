"""Pictures, label maps, classes and data folders."""
