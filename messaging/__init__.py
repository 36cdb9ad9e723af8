"""The protocol between a device and the aggregator: messages, chunks, codecs, transports, brokers.

Knows named arrays and bytes; knows neither torch nor federated learning.
"""
