"""What caches call: packed stores and attention over them."""
