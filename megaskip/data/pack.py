"""Several samples in one row. Knows lengths only: no sample is ever cut."""

from collections.abc import Iterable, Iterator, Sequence

from megaskip.data.row import PackedRow, Row

STREAM_BUFFER = 1024
"""Rows that a stream collects before it packs them; more packs tighter and starts later."""


def pack(lengths: Sequence[int], *, seq_length: int) -> list[list[int]]:
    """Return bins of indices whose lengths add up to at most `seq_length`: best-fit decreasing.

    Each index is in exactly one bin, in a deterministic order. Time is nearly linear: bins
    are kept by the room they have left, and one integer's bits say which amounts of room exist.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_length + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= seq_length, f"row {index} has {length} tokens, more than {seq_length}"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, target = seq_length, len(bins)
            bins.append([])
        bins[target].append(index)
        by_room[room - length].append(target)
        rooms |= 1 << (room - length)
    return bins


def pack_stream(rows: Iterable[Row], *, seq_length: int) -> Iterator[PackedRow]:
    """Pack a stream of rows, STREAM_BUFFER at a time."""
    buffer: list[Row] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == STREAM_BUFFER:
            yield from _packed(buffer, seq_length)
            buffer = []
    yield from _packed(buffer, seq_length)


def _packed(rows: list[Row], seq_length: int) -> Iterator[PackedRow]:
    for members in pack([len(row) for row in rows], seq_length=seq_length):
        yield PackedRow(segments=tuple(rows[i] for i in members))
