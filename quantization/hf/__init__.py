"""What is copied into an exported folder, so that transformers can load it."""
