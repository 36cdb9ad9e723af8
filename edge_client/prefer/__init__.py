"""Collecting preference pairs on a device: two candidates of its own model, ranked by a judge."""
