"""What is computed once per model and kept on disk: bases today."""
