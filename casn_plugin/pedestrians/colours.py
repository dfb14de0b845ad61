"""Colours: codes as linear light or as bytes, and the palettes of clothes and things."""

import numpy as np

Colour = tuple[float, float, float]

DARKS = (0x17181A, 0x1B1D24, 0x24304C, 0x333538, 0x3A2C24, 0x26301F)
MUTED = (0x565A5E, 0x84878A, 0x6B5F50, 0x8A7658, 0xB9A888, 0x54624A, 0x4C5F7A, 0x6C2F34)
LIGHTS = (0xDEDCD7, 0xD0CCC0, 0xB9BBBD, 0xD2BFC8, 0xAEC1D2)
BRIGHTS = (0xA8262E, 0xC24A38, 0x2C4C8C, 0x4A86B4, 0x2F7350, 0xCFA540, 0xBE5A86, 0x66447F,
           0x3F958F)  # fmt: skip

LINEAR = (np.arange(256, dtype=np.float32) / 255) ** np.float32(2.2)
"""The linear light of every byte."""


def linear(code: int) -> Colour:
    """Returns a 0xRRGGBB colour as linear light in [0, 1].

    Example:
        >>> linear(0xFF0000)
        (1.0, 0.0, 0.0)
    """
    red, green, blue = (((code >> shift & 255) / 255) ** 2.2 for shift in (16, 8, 0))
    return red, green, blue


def rgb(code: int, value: float = 1.0) -> Colour:
    """Returns a 0xRRGGBB colour as channels in 0..255, `value` times as bright.

    Example:
        >>> rgb(0x804000, 3.0)
        (255.0, 192.0, 0.0)
    """
    red, green, blue = (min((code >> shift & 255) * value, 255.0) for shift in (16, 8, 0))
    return red, green, blue


def scaled(colour: Colour, value: float) -> Colour:
    """Returns a colour `value` times as bright.

    Example:
        >>> scaled((0.25, 0.5, 0.0), 0.5)
        (0.125, 0.25, 0.0)
    """
    return colour[0] * value, colour[1] * value, colour[2] * value
