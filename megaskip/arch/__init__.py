"""Where routers meet Hugging Face decoders. Knows attribute names and arithmetic, not parallelism.

Promise: no modelling code is copied, no state-dict key changes, and a family on which skipping is
not the identity is refused with numbers.
"""

from megaskip.arch.attach import attach_routers
from megaskip.arch.decoder import DecoderParts, find_decoder
from megaskip.arch.detach import detach_routers
from megaskip.arch.probe import ProbeReport, probe_layer
from megaskip.arch.trainable import freeze

__all__ = [
    "DecoderParts",
    "ProbeReport",
    "attach_routers",
    "detach_routers",
    "find_decoder",
    "freeze",
    "probe_layer",
]
