"""How the updates of a round become the change of the global state."""
