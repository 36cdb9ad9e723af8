"""Fleets in virtual time, without training: who is asked, who answers when, and what it costs.

Everything here is modelled. Numpy alone; nothing about a device is decided here that
``device_profiles`` knows.
"""
