"""Talking to a personal model: sampling, streaming, and the runtimes that it runs on."""
