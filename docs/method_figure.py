"""The figure of the method as SVG, in colours for light and for dark pages.

``make_pictures.py`` draws it, with pictures and maps of a trained model.
"""

import base64
import io
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

LIGHT = {"ink": "#1b1f24", "soft": "#59636e", "box": "#eef2f7", "edge": "#8c959f",
         "one": "#0072b2", "two": "#9a5b00", "loss": "#b3261e"}  # fmt: skip
DARK = {"ink": "#e6edf3", "soft": "#a7b1bc", "box": "#232a33", "edge": "#7d8590",
        "one": "#6cb6ff", "two": "#f0b95c", "loss": "#ff8a80"}  # fmt: skip
WIDTH, HEIGHT = 860, 640
WORDS = (
    "Above: a network sees a picture and learns its identity; the gradient of the identity's score "
    "gives a map, what it hides is taken away, and the same network should no longer know the "
    "person. Below: two pictures, a classifier of the difference of their features, what speaks "
    "for the same in each, and the attended rows of both, which should be alike."
)


class Seen(NamedTuple):
    """What a trained model gives to draw; pictures are RGB, 0 to 255.

    Attributes:
        pictures: the two pictures of a pair.
        identification: the first picture with its map M_n.
        masked: the first picture without what the map hides.
        attended: both pictures with their maps M_1 and M_2.
        aligned: both aligned rows of maxima, in [0, 1].
    """

    pictures: list[np.ndarray]
    identification: np.ndarray
    masked: np.ndarray
    attended: list[np.ndarray]
    aligned: list[np.ndarray]


class Canvas:
    """Collects the elements of one picture.

    Args:
        colours: by name, as LIGHT and DARK have them.
    """

    def __init__(self, colours: dict[str, str]) -> None:
        self.colours, self.elements = colours, list[str]()

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = "ink",
        size: int = 15,
        at: str = "middle",
    ) -> None:
        """Writes lines of words, the first one on height y."""
        for number, line in enumerate(words.split("\n")):
            self.elements.append(
                f'<text x="{x}" y="{y + number * (size + 4)}" text-anchor="{at}" '
                f'font-size="{size}" fill="{self.colours[colour]}">{escape(line)}</text>'
            )

    def box(self, x: float, y: float, width: float, height: float, words: str) -> None:
        """Draws a box with words in its middle."""
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
            f'fill="{self.colours["box"]}" stroke="{self.colours["edge"]}"/>'
        )
        lines = words.count("\n") + 1
        self.text(x + width / 2, y + height / 2 + 5 - 9.5 * (lines - 1), words)

    def picture(self, x: float, y: float, pixels: np.ndarray, colour: str, below: str) -> None:
        """Shows a picture, 64 wide and 128 high, and says below what it is."""
        data = io.BytesIO()
        Image.fromarray(pixels).resize((128, 256), Image.Resampling.BICUBIC).save(
            data, "WEBP", quality=80, method=6
        )
        code = base64.b64encode(data.getvalue()).decode()
        self.elements.append(
            f'<image x="{x}" y="{y}" width="64" height="128" href="data:image/webp;base64,{code}"/>'
            f'<rect x="{x}" y="{y}" width="64" height="128" fill="none" stroke-width="2" '
            f'stroke="{self.colours[colour]}"/>'
        )
        self.text(x + 32, y + 145, below)

    def arrow(self, *points: tuple[float, float], colour: str = "ink", back: bool = False) -> None:
        """Draws an arrow through points; one that is a gradient is broken."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if back else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{self.colours[colour]}" '
            f'stroke-width="1.6"{dashes} marker-end="url(#{colour})"/>'
        )

    def rows(self, x: float, y: float, values: np.ndarray, colour: str, dashed: bool) -> None:
        """Draws a row of maxima from top to bottom, 80 wide and 128 high."""
        places = np.linspace(y + 4, y + 124, len(values))
        path = " ".join(f"{x + 80 * v:.1f},{p:.1f}" for v, p in zip(values, places, strict=True))
        dashes = ' stroke-dasharray="6 3"' if dashed else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{self.colours[colour]}" '
            f'stroke-width="2.5"{dashes}/>'
        )

    def svg(self, title: str, words: str) -> str:
        """Returns the picture as a file."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
            for name, colour in self.colours.items()
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="system-ui, '
            f'-apple-system, Segoe UI, Helvetica, Arial, sans-serif"><title>{escape(title)}</title>'
            f"<desc>{escape(words)}</desc><defs>{heads}</defs>\n"
            + "\n".join(self.elements)
            + "\n</svg>\n"
        )


def method_figure(seen: Seen, colours: dict[str, str]) -> str:
    """Returns the figure as SVG."""
    draw = Canvas(colours)
    identification(draw, seen)
    siamese(draw, seen)
    draw.text(20, 588, "Training (Eq. 6):   L  =  L_ide  +  λ1 L_ia  +  λ2 (L_bce + α ‖M*1 − M*2‖)",
              "loss", 16, "start")  # fmt: skip
    draw.text(20, 616, "Ranking:   distance of f1 and f2, and ‖M*1 − M*2‖, each normalised, summed",
              "ink", 16, "start")  # fmt: skip
    return draw.svg("CASN in one figure", WORDS)


def identification(draw: Canvas, seen: Seen) -> None:
    """Draws L_ide and L_ia: the same network sees a picture, and what the map leaves of it."""
    draw.text(20, 28, "1  Identification attention: see the whole person", size=17, at="start")
    draw.picture(20, 48, seen.pictures[0], "one", "I")
    draw.arrow((88, 112), (116, 112))
    draw.box(120, 82, 104, 60, "network")
    draw.arrow((226, 112), (256, 112))
    draw.box(260, 88, 56, 48, "A")
    draw.arrow((318, 112), (340, 112))
    draw.box(344, 88, 48, 48, "f")
    draw.arrow((394, 112), (416, 112))
    draw.box(420, 88, 56, 48, "y")
    draw.arrow((448, 86), (448, 68), colour="loss")
    draw.text(448, 60, "L_ide (Eq. 1)", "loss")
    draw.arrow((448, 138), (448, 164), (292, 164), (292, 138), back=True)
    draw.text(370, 182, "∂y_c/∂A", "soft")
    draw.arrow((478, 112), (500, 112))
    draw.picture(504, 48, seen.identification, "one", "M_n")
    draw.arrow((572, 112), (616, 112))
    draw.picture(620, 48, seen.masked, "one", "I · (1 − Σ(M_n))")
    draw.arrow((688, 112), (736, 112))
    draw.box(740, 82, 90, 60, "the same\nnetwork")
    draw.arrow((785, 144), (785, 172), colour="loss")
    draw.text(790, 192, "L_ia = y_c (Eq. 2):\nnot to be known", "loss")


def siamese(draw: Canvas, seen: Seen) -> None:
    """Draws L_sa: what speaks for the same person, in both pictures, row by row."""
    draw.text(20, 282, "2  Siamese attention: the same rows in every camera", size=17, at="start")
    for number, (top, colour) in enumerate(((298, "one"), (432, "two"))):
        name = "12"[number]
        draw.elements.append(f"<!-- picture {name} -->")
        draw.picture(20, top - 8 * (1 - number), seen.pictures[number], colour, "")
        middle = top + 60
        draw.arrow((88, middle), (116, middle))
        draw.box(120, middle - 24, 84, 48, "network")
        draw.arrow((206, middle), (228, middle))
        draw.box(232, middle - 24, 48, 48, f"f{name}")
    draw.arrow((282, 358), (306, 358), (306, 402), (318, 402))
    draw.arrow((282, 492), (306, 492), (306, 448), (318, 448))
    draw.box(322, 395, 76, 60, "f⁻ =\nf1 − f2")
    draw.arrow((400, 425), (418, 425))
    draw.box(422, 395, 84, 60, "pair\nclassifier")
    draw.arrow((464, 457), (464, 500), colour="loss")
    draw.text(464, 520, "z: same or not\nL_bce (Eq. 3)", "loss")
    draw.arrow((464, 393), (464, 350), (360, 350), (360, 393), back=True)
    draw.text(412, 320, "α = [∂z1/∂f⁻ > 0]\n(Eq. 4)", "soft")
    draw.text(162, 420, "shared\nweights", "soft")
    draw.arrow((508, 413), (528, 413), (528, 358), (590, 358))
    draw.arrow((508, 437), (528, 437), (528, 492), (590, 492))
    draw.text(556, 430, "∂(α, f)/∂A", "soft", 13)
    for number, (top, colour) in enumerate(((290, "one"), (432, "two"))):
        draw.picture(594, top, seen.attended[number], colour, "")
        draw.text(676, top + 70, f"M{'12'[number]}", colour)
    draw.arrow((692, 355), (708, 355), (708, 400), (720, 400))
    draw.arrow((692, 497), (708, 497), (708, 450), (720, 450))
    draw.elements.append(
        f'<rect x="724" y="354" width="104" height="140" rx="6" fill="none" '
        f'stroke="{draw.colours["edge"]}"/>'
    )
    for values, colour, dashed in zip(seen.aligned, ("one", "two"), (False, True), strict=True):
        draw.rows(736, 360, values, colour, dashed)
    draw.text(776, 324, "M*1, M*2: maxima of\nthe attended rows", "soft")
    draw.text(776, 516, "‖M*1 − M*2‖ (Eq. 5):\nto be small if same", "loss")
