"""Alembic's migrations of the store, run whenever an aggregator starts."""
