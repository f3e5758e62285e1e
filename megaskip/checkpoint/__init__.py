"""What a run leaves behind: only what trains, as safetensors, independent of ranks and engines.

Promise: a folder is complete or it is not there; what does not fit is refused with both sides
named.
"""

from megaskip.checkpoint.base import BaseModel, describe_base
from megaskip.checkpoint.routers import load_routers, read_router_config, save_routers

__all__ = ["BaseModel", "describe_base", "load_routers", "read_router_config", "save_routers"]
