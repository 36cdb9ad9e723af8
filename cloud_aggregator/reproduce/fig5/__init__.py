"""Fig. 5 of the paper: rewards and energy of alignment, every method scored by one judge."""
