"""Models: plain single-device modules `(dense, embedded) -> logits`, one file each; registry.py names them."""
