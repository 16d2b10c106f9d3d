"""Attention over pages: three libraries behind one protocol, and the choice between them."""
