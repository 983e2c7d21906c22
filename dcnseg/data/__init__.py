"""Images, label maps, classes and data folders."""
