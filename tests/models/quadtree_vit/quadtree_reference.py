"""Plain reference implementations: the quadtree with a heap, its reverse cell by cell, its tokens crop by crop."""

import heapq

import numpy as np
import torch


def heap_quadtree(scores, num_tokens=None, split_threshold=None):
    """`scores`: one (rows, columns) array a level for one picture. Returns a sorted list of (level, row, column)."""
    live, done, heap = 0, [], []

    def add(level, row, column):
        if level == len(scores):
            done.append((level, row, column))
        else:
            heapq.heappush(heap, (-float(scores[level][row][column]), level, row, column))

    rows, columns = scores[0].shape
    for row in range(rows):
        for column in range(columns):
            add(0, row, column)
            live += 1
    while heap and (num_tokens is None or live < num_tokens):
        if split_threshold is not None and -heap[0][0] <= split_threshold:
            break
        _, level, row, column = heapq.heappop(heap)
        for child in range(4):
            add(level + 1, 2 * row + child // 2, 2 * column + child % 2)
        live += 3
    return sorted(done + [entry[1:] for entry in heap])


def cell_by_cell_reverse(tokens, centers, sizes, height, width, cell):
    """One picture: tokens (n, channels) -> (channels, rows, columns)."""
    dense = np.zeros((tokens.shape[1], height // cell, width // cell), dtype=tokens.dtype)
    for token, (x, y), size in zip(tokens, centers, sizes, strict=True):
        left, top, side = round((x - size / 2) / cell), round((y - size / 2) / cell), round(size / cell)
        dense[:, top : top + side, left : left + side] = token[:, None, None]
    return dense


def bilinear_blur_scores(pixels, min_patch_size, patch_size):
    """Pixel-blur scores of one picture (channels, height, width), in float64, pixel by pixel: (rows, columns)."""

    def resized(signal, axis, length):
        old = signal.shape[axis]
        source = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, None)
        low = np.minimum(np.floor(source).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        weight = (source - low).reshape([-1 if dim == axis else 1 for dim in range(signal.ndim)])
        return np.take(signal, low, axis) * (1 - weight) + np.take(signal, high, axis) * weight

    pixels = pixels.astype(np.float64)
    _, height, width = pixels.shape
    factor = patch_size // min_patch_size
    small = resized(resized(pixels, 1, height // factor), 2, width // factor)
    error = (resized(resized(small, 1, height), 2, width) - pixels) ** 2
    rows, columns = height // patch_size, width // patch_size
    patches = error.mean(axis=0).reshape(rows, patch_size, columns, patch_size)
    return np.sqrt(patches.mean(axis=(1, 3)) * patch_size)


def crop_by_crop_tokens(tokenizer, pixel_values, patch_centers, patch_sizes):
    """Tokens of a sinusoidal tokenizer with CLS, each patch cropped from its reduced picture."""
    size, quarter = tokenizer.config.min_patch_size, tokenizer.config.hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / (quarter - 1))
    tokens = []
    for picture, centers, sides in zip(pixel_values, patch_centers.tolist(), patch_sizes.tolist(), strict=True):
        row = [tokenizer.prefix_tokens.cls_token[0, 0]]
        for (x, y), side in zip(centers, sides, strict=True):
            reduced = torch.nn.functional.interpolate(picture[None], scale_factor=size / side, mode="bilinear")
            left, top = (round((middle - side / 2) * size / side) for middle in (x, y))
            patch = tokenizer.patch_embeddings.projection(reduced[:, :, top : top + size, left : left + size])
            angles = [middle / size * frequencies for middle in (x, y)]
            position = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)])
            row.append(patch.flatten() + position)
        tokens.append(torch.stack(row))
    return torch.stack(tokens)
