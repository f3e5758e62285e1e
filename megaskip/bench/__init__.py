"""How fast training, prefill and decode are on this machine, how much memory they take, and why.

Promise: random weights, no network; every figure is written as soon as it is measured, and the
whole ends within its minutes.
"""
