"""One module a change of the store's tables, each naming the one before it."""
