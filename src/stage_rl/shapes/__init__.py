"""A small world of coloured shapes: real in every part, small enough for two CPU cores."""
