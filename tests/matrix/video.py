"""A short video of a photograph: the camera moves over it. Needs Pillow alone, so that any process can make it."""

from PIL import Image


NUM_FRAMES = 4


def moving_frames(picture: Image.Image) -> list[Image.Image]:
    """Four crops of three quarters of the picture, from left to right."""
    width, height = picture.width * 3 // 4, picture.height * 3 // 4
    lefts = [index * (picture.width - width) // (NUM_FRAMES - 1) for index in range(NUM_FRAMES)]
    return [picture.crop((left, 0, left + width, height)) for left in lefts]


__all__ = ["NUM_FRAMES", "moving_frames"]
