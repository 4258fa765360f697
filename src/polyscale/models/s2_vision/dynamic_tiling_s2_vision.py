"""Dynamic-S2 (NVILA, arXiv 2412.04468; official code: NVlabs/VILA): how many tiles the last scale of an image has."""

from collections.abc import Sequence

import torch

from .tiling_s2_vision import TilePlan


def dynamic_tile_grid(image_size: Sequence[int], multiple: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles in the last scale: the grid whose aspect ratio is nearest to the image's.

    Args:
        image_size: (height, width) of the image in pixels.
        multiple: side of the last scale's square, in tiles; the grid has at least as many tiles as that square.
        max_tiles: the most tiles.
        tile: side of a tile in pixels. Of two grids that are equally near, the one with more tiles is taken if the
            image has more than half its pixels.

    Example:

    ```python
    >>> dynamic_tile_grid((1080, 1920), multiple=3, max_tiles=12, tile=448)
    (3, 4)
    ```
    """
    height, width = image_size
    candidates = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if multiple**2 <= columns * rows <= max_tiles
    ]
    best, best_distance = (multiple, multiple), float("inf")
    for columns, rows in sorted(candidates, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - columns / rows)
        more_pixels = width * height > 0.5 * tile * tile * columns * rows
        if distance < best_distance or (distance == best_distance and more_pixels):
            best, best_distance = (columns, rows), distance
    return best[1], best[0]


def block_sizes(image_sizes: torch.Tensor, tile: int) -> list[tuple[int, int]]:
    """(rows, columns) of tiles in the last scale of each image.

    Args:
        image_sizes: (batch, 2), height and width in pixels of the last scale.
        tile: side of a tile in pixels.

    Raises:
        ValueError: for sizes that are no whole tiles.
    """
    sizes = torch.as_tensor(image_sizes).tolist()
    for size in sizes:
        if len(size) != 2 or any(side < tile or side % tile for side in size):
            raise ValueError(
                "`image_sizes` must hold (height, width) in pixels of the last scale of each image, multiples of the "
                f"tile of {tile}, got {size}."
            )
    return [(height // tile, width // tile) for height, width in sizes]


def plans_for_blocks(
    blocks: Sequence[tuple[int, int]], multiples: Sequence[float], tile: tuple[int, int]
) -> list[TilePlan]:
    """The tiles of each image, for (rows, columns) of its last scale and the squares of the scales before."""
    squares = [(tile[0] * round(multiple), tile[1] * round(multiple)) for multiple in multiples[:-1]]
    return [TilePlan((*squares, (tile[0] * rows, tile[1] * columns)), tile, "resize") for rows, columns in blocks]


def only_real_tiles(pixel_values: torch.Tensor, counts: Sequence[int], tile: tuple[int, int]) -> torch.Tensor:
    """(batch, tiles, channels, *tile) or (all tiles, channels, *tile) -> (all real tiles, channels, *tile)

    Raises:
        ValueError: for another shape, or tiles of another size.
    """
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim == 5 and shape[0] == len(counts) and shape[1] >= max(counts):
        pixel_values = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
    elif pixel_values.ndim != 4 or shape[0] != sum(counts):
        raise ValueError(
            f"`pixel_values` of shape {shape} does not fit `image_sizes`, which say {list(counts)} tiles for "
            f"{len(counts)} images: expected (images, tiles, channels, tile, tile), or (all tiles, channels, tile, "
            "tile)."
        )
    if tuple(pixel_values.shape[-2:]) != tile:
        raise ValueError(f"`pixel_values` must hold tiles of {tile} pixels, got {shape}.")
    return pixel_values


def padded(images: list[torch.Tensor | tuple | None]) -> torch.Tensor | tuple | None:
    """The same part of the output of each image (1, ...) as one batch, zeros after what is shorter; layer by layer."""
    if images[0] is None:
        return None
    if isinstance(images[0], tuple):
        return tuple(padded(list(layer)) for layer in zip(*images, strict=True))
    return torch.nn.utils.rnn.pad_sequence([image[0] for image in images], batch_first=True)


__all__ = ["block_sizes", "dynamic_tile_grid", "only_real_tiles", "padded", "plans_for_blocks"]
