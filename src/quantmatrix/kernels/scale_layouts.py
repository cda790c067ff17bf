"""Where block scales and weight rows lie for the FP4 matrix units.

A quantized weight [N, K] has one scale per 16 columns, logically a table [N, K/16]. Three layouts:

| layout | who | order |
| ------ | --- | ----- |
| plain | ModelOpt's diffusers exports | row-major [N, K/16] |
| tiled | raw FLUX.2 files; cuBLAS, cuDNN and CUTLASS at run time | tiles of 128 rows x 4 columns |
| shuffled | the TRT-LLM kernels at run time | rows (the weight's too) reordered, then tiled |

*Tiled*: rows are padded to a multiple of 128 and columns to a multiple of 4, with zeros; tiles
follow each other left to right, then top to bottom. Inside a tile the 128 rows are four groups of
32; a line of 16 bytes holds row r of each group, four scales each. With C = ceil(columns / 4) the
scale of row r and column c lies at

    ((r // 128 * C + c // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4

When N is a multiple of 128 and K/16 one of 4, tiled and plain have the same shape: the layout is a
property of the file's format and can never be seen from the tensor.

*Shuffled*: inside every 32 rows, row i moves to (i % 4) * 8 + i // 4, so that one warp's results
lie side by side. N is padded to a multiple of 128 with zero rows. Sources: cuBLAS's documentation
of block scales (tiles), flashinfer (shuffled rows).
"""

from __future__ import annotations

import torch

TILE_ROWS = 128
TILE_COLUMNS = 4
SHUFFLE_ROWS = 32


def pad_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a scale table [rows, columns] when it is tiled."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """A plain table [rows, columns] as tiles, shaped [padded rows, padded columns].

    Works on one-byte scales of any dtype and keeps it; padding is zero.
    """
    rows, columns = scales.shape
    padded_rows, padded_columns = pad_shape(rows, columns)
    table = scales.view(torch.uint8)
    if (padded_rows, padded_columns) != (rows, columns):
        padding = (0, padded_columns - columns, 0, padded_rows - rows)
        table = torch.nn.functional.pad(table, padding)
    tiles = table.reshape(padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, 4)
    tiled = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return tiled.view(scales.dtype)


def untile_scales(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The plain table [rows, columns] of tiled scales, which may have any shape and one-byte dtype.

    Raises ValueError when the number of scales is not that of the padded table.
    """
    padded_rows, padded_columns = pad_shape(rows, columns)
    if tiled.numel() != padded_rows * padded_columns:
        raise ValueError(
            f"tiled scales {list(tiled.shape)}: expected {padded_rows} x {padded_columns} values "
            f"for {rows} rows and {columns} columns"
        )
    tiles = tiled.contiguous().view(torch.uint8)
    tiles = tiles.reshape(padded_rows // TILE_ROWS, padded_columns // TILE_COLUMNS, 32, 4, 4)
    table = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return table[:rows, :columns].contiguous().view(tiled.dtype)


def find_shuffle(rows: int) -> torch.Tensor:
    """int64 [rows]: which row goes to each position in the shuffled order; rows in multiples of 32.

    Raises ValueError for any other number of rows.
    """
    if rows % SHUFFLE_ROWS:
        raise ValueError(f"{rows} rows: expected a multiple of {SHUFFLE_ROWS}")
    place = torch.arange(SHUFFLE_ROWS)
    source = place % 8 * 4 + place // 8
    blocks = torch.arange(0, rows, SHUFFLE_ROWS)
    return (blocks[:, None] + source).flatten()


def pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [rows, columns] of one-byte dtype with zero rows added up to a multiple of 128."""
    missing = -matrix.shape[0] % TILE_ROWS
    if not missing:
        return matrix
    padded = torch.nn.functional.pad(matrix.view(torch.uint8), (0, 0, 0, missing))
    return padded.view(matrix.dtype)


def shuffle_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Packed weights [rows, bytes], rows padded to 128, in the order the TRT-LLM kernels read.

    The dtype has one byte (uint8, float8_e4m3fn) and is kept.
    """
    padded = pad_rows(matrix)
    order = find_shuffle(padded.shape[0]).to(matrix.device)
    return padded.view(torch.uint8)[order].view(matrix.dtype)


def shuffle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Plain scales [rows, columns], rows padded and reordered as the weight's, then tiled.

    The dtype has one byte (float8_e4m3fn or uint8) and is kept.
    """
    return tile_scales(shuffle_rows(scales))
