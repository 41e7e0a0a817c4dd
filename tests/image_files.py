"""Images for the tests to write, and how they should look once read."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_png_16_bit(path, levels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, grey (h, w) or RGB (h, w, 3), by the format's specification (RFC 2083)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resize_by_formula(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation with the triangle filter widened to the source's pixel spacing, in float64."""

    def weights(length):
        scale = length / size
        centres, pixels = (np.arange(size) + 0.5) * scale, np.arange(length) + 0.5
        triangle = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / max(scale, 1))
        return triangle / triangle.sum(axis=1, keepdims=True)

    rows = np.tensordot(weights(image.shape[0]), image.astype(np.float64), 1)  # (y, j, c)
    return np.einsum("xj,yjc->yxc", weights(image.shape[1]), rows)


def make_classes(root, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(root / name / f"{i}.png", np.full((2, 2, 3), 10 * label + i, np.uint8))


def encoded(pixels: np.ndarray, kind: str = "PNG") -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    buffer.seek(0)
    return buffer
