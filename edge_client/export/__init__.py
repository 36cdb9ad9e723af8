"""A personal model leaves its run: put together, merged, written, checked."""
