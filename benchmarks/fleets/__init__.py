"""The work that ``benchmarks/fleet.py`` gives to each engine, and the engines that it compares."""
