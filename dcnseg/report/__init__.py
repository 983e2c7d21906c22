"""Reports on runs and comparisons: one HTML file each, without references to other files."""
