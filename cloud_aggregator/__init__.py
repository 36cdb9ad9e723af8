"""The cloud side: rounds, aggregation, methods, the run's records, reports, and the emulator.

Sees named arrays only; nothing but ``emulation`` knows how a device trains.
"""
