"""Sparse video attention and training-free control for Hugging Face diffusers."""

from attnproc._checkout import link_checkout

link_checkout()

__version__ = "0.1.0"
