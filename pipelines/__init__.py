"""Denoising loops that need more than a processor, and the command line."""
