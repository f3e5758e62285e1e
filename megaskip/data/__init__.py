"""From files of any common format to batches of tokens and labels.

Promise: equal input gives equal batches on every rank and after any resume; no loss is silent.
"""

from megaskip.data.collate import Batch, collate
from megaskip.data.dataset import TokenizedData, build_dataset
from megaskip.data.pack import pack
from megaskip.data.row import AnyRow, PackedRow, Row
from megaskip.data.sampler import GlobalBatchOrder, shard
from megaskip.data.stats import DataStats, SourceStats
from megaskip.data.store import StoredRows
from megaskip.data.streaming import StreamingRows

__all__ = [
    "AnyRow",
    "Batch",
    "DataStats",
    "GlobalBatchOrder",
    "PackedRow",
    "Row",
    "SourceStats",
    "StoredRows",
    "StreamingRows",
    "TokenizedData",
    "build_dataset",
    "collate",
    "pack",
    "shard",
]
