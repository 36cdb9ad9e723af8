"""A device: its data, its small trainable modules, its training, and the agent that takes part.

Knows neither who aggregates nor how many others there are.
"""
