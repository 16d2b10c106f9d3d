"""`python -m minisgl.bench`: every claim of speed in this project comes from here."""
