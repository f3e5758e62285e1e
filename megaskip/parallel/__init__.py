"""One training step on any number of ranks: sharding, agreement, liveness. DeepSpeed lives here
only.

Promise: every rank runs the same collectives, whatever the routers decide, and a dead rank is
named.
"""
