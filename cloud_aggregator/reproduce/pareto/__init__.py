"""Personal means personal: the same clients at several weights of the two rewards."""
