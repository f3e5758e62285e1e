"""What a machine has for megaskip: libraries, devices, memory, disk, collectives.

Promise: it changes nothing, and shows no variable that may hold a secret.
"""
