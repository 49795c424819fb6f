"""The operations that caches call: packed stores and attention over them."""
