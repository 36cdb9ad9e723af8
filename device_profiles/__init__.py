"""What a device is and what each round costs it: profiles, fleets, the uplink, time and energy.

Plain values in, plain values out; knows neither torch nor MQTT.
"""
