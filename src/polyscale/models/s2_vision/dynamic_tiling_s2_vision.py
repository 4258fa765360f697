"""Dynamic-S2 (NVILA, arXiv 2412.04468; official code: NVlabs/VILA): how many tiles the last scale of a picture has."""

from collections.abc import Sequence


def dynamic_tile_grid(image_size: Sequence[int], multiple: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles in the last scale: the grid whose aspect ratio is nearest to the picture's.

    Args:
        image_size: (height, width) of the picture in pixels.
        multiple: side of the last scale's square, in tiles; the grid has at least as many tiles as that square.
        max_tiles: the most tiles.
        tile: side of a tile in pixels. Of two grids that are equally near, the one with more tiles is taken if the
            picture has more than half its pixels.

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


__all__ = ["dynamic_tile_grid"]
