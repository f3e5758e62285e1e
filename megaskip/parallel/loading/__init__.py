"""Weights from files into replicas, partitions and stages."""
