"""What a frozen weight can be held in, one file a backend; the table is in ``precision``."""
