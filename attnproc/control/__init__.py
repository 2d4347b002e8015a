"""Control of image models without training: one file per method, and what they share of U-Nets, words and masks."""
