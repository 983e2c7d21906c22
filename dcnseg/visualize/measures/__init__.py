"""Measures of the offsets over a data set; the entry point is `measuring.measure_offsets`."""
