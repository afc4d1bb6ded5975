"""The split of the bank over thread blocks."""

import itertools

import pytest

# Rows and columns of a tile at P = 256, by path; 4 bytes a padded channel and 16 of statistics a row and split.
TILES = {70: (64, 16), 80: (128, 32), 90: (128, 96)}
WORKSPACE_BYTES = 4 * 256 + 16


def length(row_tiles: int, bank_tiles: int, splits: int, multiprocessors: int) -> int:
    """How many tiles pass one after another: waves of blocks times tiles of a block."""
    return -(-row_tiles * splits // multiprocessors) * -(-bank_tiles // splits)


@pytest.mark.parametrize("multiprocessors", [1, 3, 80, 108, 132, 148])
def test_the_fewest_splits_within_5_percent_of_the_shortest(emulated, path, multiprocessors):
    target = emulated.Target(path, 0, multiprocessors, 0)
    tile_rows, tile_columns = TILES[path]
    for rows, bank_rows in itertools.product(
        (1, 64, 128, 256, 500, 512, 1024, 2048, 3000, 16384), (1, 97, 1000, 8192, 65536, 99999, 1 << 20, 1 << 24)
    ):
        row_tiles, bank_tiles = -(-rows // tile_rows), -(-bank_rows // tile_columns)
        most = min(max(bank_tiles // 4, 1), 64)
        # Runs of whole tiles: fewer splits than asked for may already hold them all.
        lengths = {}
        for asked in range(1, most + 1):
            splits = -(-bank_tiles // -(-bank_tiles // asked))
            lengths[splits] = length(row_tiles, bank_tiles, splits, multiprocessors)
        shortest = min(lengths.values())
        expected = min(splits for splits, value in lengths.items() if 100 * value <= 105 * shortest)
        found = emulated.bank_attend_workspace(rows, bank_rows, 256, target) / (rows * WORKSPACE_BYTES)
        assert found == expected, (rows, bank_rows)
