"""A device's text: reading it, writing prompts, dividing it among clients, making batches."""
