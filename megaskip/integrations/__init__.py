"""Router-tuning in the training loops of other libraries: transformers' Trainer, TRL's SFTTrainer.

Promise: the same losses and decisions as megaskip's own trainer on the same batches.
"""

from megaskip.integrations.batches import BatchMasks, describe_inputs
from megaskip.integrations.trainer import route_tune

__all__ = ["BatchMasks", "describe_inputs", "route_tune"]
