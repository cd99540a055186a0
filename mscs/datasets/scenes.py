"""Drawn scenes for the laptop profile: streets, rooms, landscapes and eye surgery, each with exact labels.

A scene is painted back to front on a `Canvas`, the picture and the label map together. Everything except
the eye stands in a world in metres seen by a pinhole camera: `Canvas.plane` gives a view on any flat piece
of that world (a facade, a floor, the side of a bus) on which shapes are drawn in metres and textures
foreshorten by themselves.

What tells classes apart is texture, layout and outline. Colours come from wide, overlapping ranges and the
light changes from picture to picture, so colour alone does not give a class away. Classes that the paper's
Figs. 2-4 show being confused share their local look and differ in overall shape or context only.
"""

import colorsys
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

Shape = NDArray[np.float64]  # (N, 2) outline, in the units of the view it is painted on
Vector = tuple[float, float, float]
Range = tuple[float, float]

OVERSAMPLE = 2
SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class Surface:
    """Colour (RGB, 0-255) and a texture of the given period (units of the view) and relative contrast."""

    color: Vector
    texture: str = "plain"
    period: float = 1.0
    contrast: float = 0.0

    def lit(self, factor: float) -> "Surface":
        """Return the surface under more or less light."""
        red, green, blue = self.color
        return replace(self, color=(red * factor, green * factor, blue * factor))


def _joints(u: Shape, v: Shape) -> Shape:
    return -((u % 1 < 0.16) | (v % 1 < 0.16)).astype(np.float64)


TEXTURES: dict[str, Callable[[Shape, Shape], Shape]] = {
    "plain": lambda u, v: np.zeros_like(u),
    "stripes": lambda u, v: np.sign(np.sin(2 * np.pi * u)),
    "bands": lambda u, v: np.sign(np.sin(2 * np.pi * v)),
    "folds": lambda u, v: np.sin(2 * np.pi * u + 0.6 * np.sin(3 * v)),
    "ripples": lambda u, v: np.sin(2 * np.pi * (v + 0.15 * np.sin(2.1 * u))),
    "checker": lambda u, v: np.sign(np.sin(np.pi * u) * np.sin(np.pi * v)),
    "knurl": lambda u, v: np.sign(np.sin(np.pi * (u + v)) * np.sin(np.pi * (u - v))),
    "tiles": _joints,
    "bricks": lambda u, v: _joints(u / 2 + 0.5 * (np.floor(v) % 2), v),
}

# name: hue, saturation and value ranges (0-1), texture, period, contrast ("noise" is drawn by the canvas)
MATERIALS: dict[str, tuple[Range, Range, Range, str, float, float]] = {
    "sky": ((0.50, 0.66), (0.02, 0.50), (0.38, 0.98), "plain", 1.0, 0.0),
    "dusk": ((0.02, 0.12), (0.05, 0.45), (0.40, 0.95), "plain", 1.0, 0.0),
    "road": ((0.00, 1.00), (0.00, 0.16), (0.26, 0.58), "noise", 0.3, 0.08),
    "sidewalk": ((0.00, 1.00), (0.00, 0.20), (0.38, 0.78), "tiles", 0.8, 0.50),
    "building": ((0.00, 1.00), (0.02, 0.45), (0.30, 0.90), "bands", 0.5, 0.08),
    "wall": ((0.00, 1.00), (0.02, 0.40), (0.30, 0.75), "bricks", 0.5, 0.55),
    "fence": ((0.00, 1.00), (0.02, 0.50), (0.30, 0.85), "plain", 1.0, 0.0),
    "leaves": ((0.07, 0.42), (0.20, 0.65), (0.22, 0.62), "noise", 0.7, 0.42),
    "grass": ((0.07, 0.40), (0.15, 0.60), (0.28, 0.68), "stripes", 0.35, 0.20),
    "paint": ((0.00, 1.00), (0.05, 0.75), (0.22, 0.85), "plain", 1.0, 0.0),
    "cloth": ((0.00, 1.00), (0.05, 0.65), (0.18, 0.75), "plain", 1.0, 0.0),
    "metal": ((0.00, 1.00), (0.00, 0.12), (0.25, 0.70), "plain", 1.0, 0.0),
    "glass": ((0.50, 0.66), (0.05, 0.30), (0.15, 0.45), "plain", 1.0, 0.0),
    "skin": ((0.02, 0.10), (0.12, 0.50), (0.40, 0.90), "noise", 0.09, 0.22),
    "paper": ((0.00, 1.00), (0.02, 0.35), (0.35, 0.85), "stripes", 0.3, 0.10),
    "planks": ((0.02, 0.14), (0.10, 0.60), (0.28, 0.70), "bricks", 0.25, 0.40),
    "ceiling": ((0.00, 1.00), (0.00, 0.15), (0.65, 0.98), "plain", 1.0, 0.0),
    "drape": ((0.00, 1.00), (0.05, 0.60), (0.30, 0.85), "folds", 0.16, 0.40),
    "carpet": ((0.00, 1.00), (0.10, 0.60), (0.25, 0.75), "checker", 0.3, 0.35),
    "fabric": ((0.00, 1.00), (0.05, 0.65), (0.22, 0.75), "noise", 0.25, 0.22),
    "coat": ((0.02, 0.14), (0.05, 0.55), (0.18, 0.80), "noise", 0.5, 0.30),
    "water": ((0.00, 1.00), (0.05, 0.35), (0.30, 0.80), "ripples", 1.2, 0.25),
    "rock": ((0.00, 1.00), (0.02, 0.35), (0.30, 0.75), "noise", 18.0, 0.30),
    "earth": ((0.02, 0.14), (0.05, 0.50), (0.30, 0.75), "noise", 0.3, 0.20),
    "sclera": ((0.02, 0.10), (0.08, 0.42), (0.45, 0.92), "plain", 1.0, 0.0),
    "pupil": ((0.00, 1.00), (0.05, 0.65), (0.08, 0.65), "plain", 1.0, 0.0),
    "glove": ((0.00, 1.00), (0.02, 0.40), (0.45, 0.95), "plain", 1.0, 0.0),
}
DARK = Surface((28, 28, 32))
LIGHT = Surface((235, 232, 222))
SHADOW = Surface((10, 10, 16))


def box(left: float, low: float, right: float, high: float) -> Shape:
    """Return an upright rectangle."""
    return np.array([(left, low), (right, low), (right, high), (left, high)], dtype=np.float64)


def disc(x: float, y: float, rx: float, ry: float | None = None, arc: Range = (0.0, 1.0)) -> Shape:
    """Return an ellipse around (x, y), or the part of it between two fractions of a full turn."""
    turn = 2 * np.pi * np.linspace(arc[0], arc[1], 48)
    return np.stack([x + rx * np.cos(turn), y + (rx if ry is None else ry) * np.sin(turn)], axis=1)


def stroke(points: Shape | list[Range], start: float, end: float | None = None) -> Shape:
    """Return the outline of a line through `points`, `start` wide at its beginning and `end` at its end."""
    line = np.asarray(points, dtype=np.float64)
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = np.linspace(start, start if end is None else end, len(line))[:, None] / 2
    return np.concatenate([line + normal * half, (line - normal * half)[::-1]])


class Canvas:
    """A picture and its label map; `rng` decides all that is random in both.

    The canvas itself is measured in picture heights: x from 0 to `aspect`, y from 0 (top) to 1. `ids` gives
    the label value of each class name; a name it does not have is painted as unlabelled.
    """

    def __init__(
        self, size: tuple[int, int], rng: np.random.Generator, ids: Mapping[str, int], unlabelled: int
    ):
        height, width = size
        self.rng, self.ids, self.unlabelled = rng, ids, unlabelled
        self.aspect = width / height
        self.image = np.zeros((height * OVERSAMPLE, width * OVERSAMPLE, 3), dtype=np.float32)
        self.label = np.full(self.image.shape[:2], unlabelled, dtype=np.uint8)
        self._unit = height * OVERSAMPLE
        # Blurred with a margin that continues on the other side, so that the tile repeats without seams.
        noise = np.pad(rng.normal(size=(256, 256)), 16, mode="wrap")
        noise = cv2.GaussianBlur(noise, (0, 0), 2.5)[16:-16, 16:-16]
        self._noise = np.clip(noise / noise.std(), -1.6, 1.6)
        self._view = np.eye(3)
        self._camera = np.eye(3)
        self.eye_height = 0.0

    def look(self, vanish: Range, focal: float, eye_height: float) -> None:
        """Place the camera: vanishing point and focal length in picture heights, eye height in metres."""
        self._camera = np.array([[focal, 0, vanish[0]], [0, focal, vanish[1]], [0, 0, 1]], dtype=np.float64)
        self.eye_height = eye_height

    def plane(self, origin: Vector, right: Vector, up: Vector) -> "Canvas":
        """Return a view in metres on a plane of the world (x to the right, y above the ground, z ahead)."""
        to_eye = np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]])
        axes = to_eye @ np.array([right, up, origin], dtype=np.float64).T
        axes[1, 2] += self.eye_height
        return self._seen_through(self._camera @ axes)

    def front(self, x: float, z: float, y: float = 0.0) -> "Canvas":
        """Return a view on the upright plane that faces the camera at distance `z`."""
        return self.plane((x, y, z), (1, 0, 0), (0, 1, 0))

    def side(self, x: float, z: float, y: float = 0.0) -> "Canvas":
        """Return a view on the upright plane that runs ahead from distance `z`."""
        return self.plane((x, y, z), (0, 0, 1), (0, 1, 0))

    def floor(self, y: float = 0.0) -> "Canvas":
        """Return a view on the level plane at height `y`, in (x, z)."""
        return self.plane((0, y, 0), (1, 0, 0), (0, 0, 1))

    def local(self, x: float, y: float, scale: float = 1.0, turn: float = 0.0) -> "Canvas":
        """Return this view moved to (x, y), scaled (negative mirrors left-right) and turned (radians)."""
        cos, sin = abs(scale) * np.cos(turn), abs(scale) * np.sin(turn)
        move = np.array([[cos, -sin, x], [sin, cos, y], [0, 0, 1]])
        return self._seen_through(self._view @ move @ np.diag([np.sign(scale), 1, 1]))

    def _seen_through(self, matrix: NDArray[np.float64]) -> "Canvas":
        view = copy.copy(self)
        view._view = matrix
        return view

    def between(self, low: float, high: float) -> float:
        """Draw a number."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """Draw yes or no."""
        return bool(self.rng.random() < probability)

    def material(self, name: str) -> Surface:
        """Draw a surface of the named material: same texture each time, another colour."""
        hue, saturation, value, texture, period, contrast = MATERIALS[name]
        color = colorsys.hsv_to_rgb(self.between(*hue), self.between(*saturation), self.between(*value))
        grain = period * self.between(0.8, 1.25)
        return Surface((255 * color[0], 255 * color[1], 255 * color[2]), texture, grain, contrast)

    def paint(self, name: str | None, surface: Surface, *shapes: Shape, opacity: float = 1.0) -> None:
        """Cover the union of `shapes`; name None changes the picture and leaves the labels."""
        outlines = []
        for shape in shapes:
            seen = np.c_[shape, np.ones(len(shape))] @ self._view.T
            outlines.append(self._unit * seen[:, :2] / seen[:, 2:])
        corners = np.concatenate(outlines)
        (left, top), (right, bottom) = (
            np.clip(edge, 0, self.label.shape[::-1]).astype(int)
            for edge in (np.floor(corners.min(0)) - 1, np.ceil(corners.max(0)) + 2)
        )
        if left >= right or top >= bottom:
            return
        mask = np.zeros((bottom - top, right - left), dtype=np.uint8)
        for outline in outlines:
            fixed = np.round((outline - (left, top)) * 2**SUBPIXEL_BITS).astype(np.int32)
            cv2.fillPoly(mask, [fixed], 1, shift=SUBPIXEL_BITS)
        rows, columns = np.nonzero(mask)
        rows, columns = rows + top, columns + left
        color = (1 + self._texture(surface, rows, columns))[:, None] * np.asarray(
            surface.color, dtype=np.float32
        )
        self.image[rows, columns] += opacity * (color - self.image[rows, columns])
        if name is not None:
            self.label[rows, columns] = self.ids.get(name, self.unlabelled)

    def _texture(self, surface: Surface, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray:
        pixels = np.stack([columns + 0.5, rows + 0.5, np.full(len(rows), self._unit)]) / self._unit
        u, v, w = np.linalg.inv(self._view) @ pixels
        u, v = u / (w * surface.period), v / (w * surface.period)
        if surface.texture == "noise":
            wave = self._noise[np.floor(8 * v).astype(int) % 256, np.floor(8 * u).astype(int) % 256]
        else:
            wave = TEXTURES[surface.texture](u, v)
        return (surface.contrast * wave).astype(np.float32)

    def gradient(self, top: Vector, bottom: Vector, until: float) -> None:
        """Blend the picture above y = `until` from one colour to another, as a sky does."""
        rows = int(until * self._unit) + 1
        mix = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
        self.image[:rows] = np.asarray(top) * (1 - mix) + np.asarray(bottom) * mix

    def develop(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the picture (H, W, 3) RGB under its light and with sensor noise, and the labels (H, W)."""
        height, width = (length // OVERSAMPLE for length in self.label.shape)
        image = cv2.resize(self.image, (width, height), interpolation=cv2.INTER_AREA)
        tint = self.between(0.65, 1.25) * self.rng.uniform(0.8, 1.2, 3)
        slope = np.linspace(-1, 1, width)[None, :] * self.between(-0.12, 0.12)
        light = (tint * (1 + slope)[..., None]).astype(np.float32)
        noise = self.rng.normal(0, 3.0, image.shape).astype(np.float32)
        half = OVERSAMPLE // 2
        picture = np.clip(np.rint(image * light + noise), 0, 255).astype(np.uint8)
        return picture, np.ascontiguousarray(self.label[half::OVERSAMPLE, half::OVERSAMPLE])


def block(
    c: Canvas, name: str, surface: Surface, x: float, z: float, size: Vector, base: float = 0.0
) -> tuple[Canvas, Canvas]:
    """Paint a box of (width, height, depth) and return views on its front and its visible side.

    On the front x runs from -width/2, on the side from 0 (near) to depth; y from 0 to height.
    """
    width, height, depth = size
    edge = x - width / 2 if x > 0 else x + width / 2
    front, side = c.front(x, z, base), c.side(edge, z, base)
    side.paint(name, surface.lit(0.72), box(0, 0, depth, height))
    if base + height < c.eye_height:
        c.floor(base + height).paint(name, surface.lit(1.2), box(x - width / 2, z, x + width / 2, z + depth))
    front.paint(name, surface, box(-width / 2, 0, width / 2, height))
    return front, side


def shade(c: Canvas, x: float, z: float, rx: float, rz: float) -> None:
    """Darken the ground under something."""
    c.floor().paint(None, SHADOW, disc(x, z, rx, rz), opacity=0.45)


def figure(c: Canvas, name: str, seated: bool = False) -> None:
    """Paint a human 1.75 m tall on view `c`; seated, the same figure with bent legs."""
    top, bottom = c.material("cloth"), c.material("cloth")
    skin = c.material("skin")
    step = c.between(0.08, 0.22)
    hip, knee = (0.0, 0.88), (0.32, 0.62)
    if seated:
        legs = [stroke([hip, knee, (0.16, 0.22)], 0.19, 0.13)]
        arms = [stroke([(0.02, 1.36), (0.26, 1.12), (0.46, 1.14)], 0.13, 0.1)]
    else:
        legs = [stroke([hip, (sign * step, 0.0)], 0.21, 0.13) for sign in (-1, 1)]
        arms = [stroke([(sign * 0.17, 1.38), (sign * 0.27, 0.82)], 0.13, 0.09) for sign in (-1, 1)]
    c.paint(name, bottom, *legs)
    c.paint(
        name, top, *arms, stroke([(0.0, 0.82), (0.03, 1.15), (0.05 if seated else 0.0, 1.47)], 0.36, 0.42)
    )
    c.paint(name, skin, disc(0.07 if seated else 0.0, 1.61, 0.115, 0.145))
    c.paint(name, skin.lit(0.35), disc(0.05 if seated else 0.0, 1.67, 0.12, 0.1))


def wheels(c: Canvas, name: str, centers: tuple[Range, ...], radius: float, tyre: float) -> None:
    """Paint spoked wheels seen from the side."""
    for x, y in centers:
        c.paint(name, DARK, disc(x, y, radius), opacity=0.25)
        c.paint(name, LIGHT.lit(0.6), *(stroke([(x, y - radius), (x, y + radius)], 0.02),))
        c.paint(name, DARK, stroke(disc(x, y, radius - tyre / 2), tyre))


def two_wheeler(c: Canvas, name: str) -> None:
    """Paint a bicycle (thin tubes) or a motorcycle (a body between thick wheels), 1.8 m long, side view."""
    metal = c.material("paint")
    if name == "bicycle":
        wheels(c, name, ((-0.55, 0.36), (0.55, 0.36)), 0.36, 0.07)
        frame = [[(-0.55, 0.36), (-0.2, 0.8), (0.38, 0.8), (0.02, 0.36), (-0.55, 0.36)]]
        bars = [
            [(0.55, 0.36), (0.38, 0.8), (0.42, 1.05)],
            [(0.3, 1.08), (0.5, 1.05)],
            [(-0.3, 0.9), (-0.1, 0.9)],
        ]
        c.paint(name, metal, *(stroke(list(line), 0.09) for line in frame + bars))
    else:
        wheels(c, name, ((-0.62, 0.32), (0.62, 0.32)), 0.32, 0.16)
        hull = [
            (-0.75, 0.62),
            (-0.6, 0.9),
            (-0.1, 0.78),
            (0.2, 0.98),
            (0.45, 0.85),
            (0.35, 0.35),
            (-0.35, 0.3),
        ]
        c.paint(name, metal, np.array(hull), stroke([(0.62, 0.32), (0.4, 1.05), (0.28, 1.1)], 0.1))
        c.paint(None, DARK, box(-0.3, 0.3, 0.25, 0.55), stroke([(-0.6, 0.9), (-0.1, 0.82)], 0.1))


def rider(c: Canvas) -> None:
    """Paint the human of `figure` seated on a two-wheeler."""
    two_wheeler(c, "bicycle" if c.chance(0.6) else "motorcycle")
    figure(c.local(-0.2, 0.02), "rider", seated=True)


def livery(c: Canvas, length: float, height: float, glass: Surface) -> None:
    """Decorate the long side of a bus, truck or tram: the same row of panes and stripe for all three."""
    panes = max(2, round(length / 1.3))
    step = length / panes
    c.paint(
        None,
        glass,
        *(box((i + 0.12) * step, 0.5 * height, (i + 0.88) * step, 0.82 * height) for i in range(panes)),
    )
    c.paint(None, LIGHT, box(0, 0.3 * height, length, 0.36 * height), opacity=0.8)
    c.paint(None, DARK, *(disc(x, 0.0, 0.42) for x in (0.18 * length, 0.8 * length)))


def vehicle(c: Canvas, name: str, x: float, z: float, across: bool) -> None:
    """Paint a car, bus, truck or train, driving away or crossing; parts are (start, length, height, base)."""
    parts: dict[str, list[tuple[float, float, float, float]]] = {
        "car": [(0.0, 4.2, 0.75, 0.25), (0.7, 2.3, 0.6, 1.0)],
        "bus": [(0.0, 10.5, 2.75, 0.35)],
        "truck": [(0.0, 5.6, 2.75, 0.75), (5.9, 1.8, 1.9, 0.35)],
        "train": [(0.0, 11.0, 2.9, 0.35), (11.4, 11.0, 2.9, 0.35)],
    }
    surface, glass, breadth = c.material("paint"), c.material("glass"), 1.8 if name == "car" else 2.5
    mirrored = across and c.chance(0.5)
    total = max(start + length for start, length, _, _ in parts[name])
    shade(
        c,
        x,
        z + (0.5 * breadth if across else 0.5 * total),
        0.55 * (total if across else breadth),
        0.5 * (breadth if across else total),
    )
    for start, length, height, base in sorted(parts[name], key=lambda part: (part[3], -part[0])):
        cabin = name == "car" and base > 0.5
        if across:
            middle = x + (total / 2 - start - length / 2) * (-1 if mirrored else 1)
            long, _ = block(c, name, surface, middle, z, (length, height, breadth), base)
            long = long.local(-length / 2, 0)
        else:
            short, long = block(c, name, surface, x, z + start, (breadth, height, length), base)
            _rear(short, breadth, height, glass, lights=not cabin)
        if cabin:
            long.paint(None, glass, box(0.15, 0.1, 1.05, 0.5), box(1.2, 0.1, length - 0.15, 0.5))
        elif name == "car":
            long.paint(name, DARK, *(disc(x, 0.05, 0.32) for x in (0.85, length - 0.85)))
        else:
            livery(long, length, height, glass)


def _rear(c: Canvas, width: float, height: float, glass: Surface, lights: bool) -> None:
    c.paint(
        None, glass, box(-0.42 * width, 0.5 * height if lights else 0.1 * height, 0.42 * width, 0.85 * height)
    )
    if lights:
        c.paint(
            None,
            Surface((200, 40, 35)),
            *(
                box(x - 0.12, 0.25 * height, x + 0.12, 0.25 * height + 0.16)
                for x in (-0.38 * width, 0.38 * width)
            ),
        )


def tree(c: Canvas, name: str, height: float) -> None:
    """Paint a tree: a trunk and a crown of leafy clumps, lighter towards the top."""
    leaves = c.material("leaves")
    c.paint(
        name,
        c.material("wall").lit(0.6),
        stroke([(0, 0), (0.05, 0.5 * height)], 0.07 * height, 0.05 * height),
    )
    for _ in range(9):
        y = c.between(0.42, 0.85)
        reach = 0.3 * np.sin(np.pi * (y - 0.2))
        clump = disc(c.between(-reach, reach) * height, y * height, c.between(0.12, 0.2) * height)
        c.paint(name, leaves.lit(0.6 + 0.6 * y), clump)


def post(c: Canvas) -> None:
    """Paint a pole that carries nothing, a lamp arm, a traffic light or a traffic sign."""
    kind = c.rng.choice(["lamp", "light", "sign"], p=[0.3, 0.3, 0.4])
    height = {"lamp": c.between(5, 7), "light": c.between(2.9, 3.6), "sign": c.between(2.2, 3.0)}[kind]
    metal = c.material("metal")
    c.paint("pole", metal, stroke([(0, 0), (0, height)], 0.17, 0.12))
    if kind == "lamp":
        c.paint(
            "pole",
            metal,
            stroke([(0, height), (1.1, height + 0.2)], 0.13),
            box(0.8, height, 1.4, height + 0.14),
        )
    elif kind == "light":
        c.paint("traffic light", c.material("metal").lit(0.6), box(-0.24, height - 0.95, 0.24, height + 0.2))
        glow = c.rng.integers(3)
        for i, color in enumerate([(60, 220, 120), (250, 190, 60), (240, 60, 50)]):
            lamp = Surface(color).lit(1.0 if i == glow else 0.35)
            c.paint(None, lamp, disc(0, height - 0.74 + 0.36 * i, 0.14))
    else:
        outer = c.material("paint")
        corners = c.rng.choice([3, 4, 48])
        turn = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
        plate = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        c.paint("traffic sign", outer, 0.46 * plate + (0, height))
        c.paint(None, LIGHT, 0.3 * plate + (0, height))
        c.paint(None, DARK, box(-0.1, height - 0.08, 0.1, height + 0.08))


def facade(c: Canvas, length: float, height: float, name: str = "building") -> None:
    """Paint a house front with storeys of windows and a door or shop."""
    c.paint(name, c.material("building"), box(0, 0, length, height))
    c.paint(None, SHADOW, box(0, 0.93 * height, length, 0.96 * height), box(0, 0, length, 0.25), opacity=0.4)
    glass = LIGHT.lit(c.between(0.6, 1.0)) if c.chance(0.25) else c.material("glass")
    across, storey = c.between(2.0, 3.2), c.between(2.8, 3.4)
    columns, floors = max(1, int(length / across)), max(1, int((height - 1) / storey))
    pitch = length / columns
    wide, tall = c.between(0.22, 0.32) * pitch, c.between(1.4, 1.9)
    for floor in range(floors):
        for i in range(columns):
            x, y = (i + 0.5) * pitch, 0.8 + floor * storey
            bottom = 0.0 if floor == 0 and i % 3 == 1 else y
            c.paint(None, LIGHT, box(x - wide - 0.12, bottom, x + wide + 0.12, y + tall + 0.12), opacity=0.6)
            c.paint(None, glass, box(x - wide, bottom, x + wide, y + tall))


def fence(c: Canvas, length: float, height: float = 2.0) -> None:
    """Paint a see-through fence of rails and pickets; what is between the pickets counts as fence."""
    surface = c.material("fence")
    c.paint("fence", SHADOW, box(0, 0, length, height), opacity=0.5)
    pickets = [box(x, 0, x + 0.2, height) for x in np.arange(0, length, 0.5)]
    c.paint(
        "fence", surface, *pickets, box(0, 0.2, length, 0.34), box(0, height - 0.3, length, height - 0.16)
    )


def sky(c: Canvas, horizon: float) -> None:
    """Paint a sky with clouds, paler towards the horizon."""
    high = c.material("sky" if c.chance(0.75) else "dusk")
    c.paint("sky", high, box(0, 0, c.aspect, horizon + 0.02))
    red, green, blue = high.color
    c.gradient(high.color, (0.6 * red + 70, 0.6 * green + 70, 0.6 * blue + 70), horizon + 0.02)
    for _ in range(c.rng.integers(0, 5)):
        x, y, size = c.between(0, c.aspect), c.between(0.02, 0.7 * horizon), c.between(0.06, 0.16)
        for _ in range(5):
            puff = disc(
                x + c.between(-1.2, 1.2) * size, y + c.between(-0.1, 0.1) * size, size * 0.6, size * 0.18
            )
            c.paint(None, LIGHT, puff, opacity=0.3)


def _roadside(c: Canvas, x: float, sign: int) -> None:
    """Paint what lines one side of a street, from far to near."""
    z = 46.0
    while z > 4.0:
        length = c.between(7, 13)
        near = max(z - length, 2.5)
        view = c.side(sign * x, near)
        kind = c.rng.choice(["building", "trees", "wall", "fence"], p=[0.4, 0.2, 0.2, 0.2])
        if kind == "building":
            facade(view, z - near, c.between(6, 16))
        else:
            for depth in np.arange(z, near, -4.0):
                tree(c.front(sign * (x + 3), float(depth)), "vegetation", c.between(4.5, 8))
            if kind == "wall":
                view.paint("wall", c.material("wall"), box(0, 0, z - near, 2.8))
            elif kind == "fence":
                fence(view, z - near)
        z = near if near > 2.5 else 0.0


def street(c: Canvas, quiet: tuple[str, ...] = ()) -> None:
    """Paint a street in perspective with its traffic, without the kinds of it named in `quiet`."""
    horizon = c.between(0.36, 0.43)
    c.look((c.aspect / 2 + c.between(-0.15, 0.15), horizon), 1.05, c.between(2.0, 2.5))
    sky(c, horizon)
    for x in np.arange(-34, 34, 8.0):
        if c.chance(0.5):
            facade(c.front(x, 52), 7.5, c.between(4, 13))
        else:
            tree(c.front(x + 4, 50), "vegetation", c.between(6, 10))
    ground, road, kerb = c.floor(), c.between(2.8, 3.8), c.between(2.8, 4.2)
    ground.paint("terrain", c.material("grass"), box(-90, 2.0, 90, 160))
    ground.paint("sidewalk", c.material("sidewalk"), box(-road - kerb, 2.0, road + kerb, 160))
    ground.paint("road", c.material("road"), box(-road, 2.0, road, 160))
    ground.paint(None, LIGHT, *(box(-0.08, z, 0.08, z + 2) for z in np.arange(2.0, 56, 4.5)), opacity=0.8)
    ground.paint(
        None, LIGHT.lit(0.8), box(-road, 2, -road + 0.12, 60), box(road - 0.12, 2, road, 60), opacity=0.7
    )
    verge = c.between(0.5, 2.5)
    for sign in (-1, 1):
        _roadside(c, road + kerb + verge, sign)
    _traffic(c, road, kerb, quiet)


Crowd = list[tuple[Callable[[float], None], int, int, float, float]]
"""What may stand in a scene: (draw at distance z, at least, fewer than, nearest, farthest)."""


def _populate(c: Canvas, crowd: Crowd) -> None:
    """Draw random numbers of things at random distances, the farthest first."""
    things = [
        (c.between(near, far), draw)
        for draw, least, below, near, far in crowd
        for _ in range(c.rng.integers(least, below))
    ]
    for z, draw in sorted(things, key=lambda thing: -thing[0]):
        draw(z)


def _traffic(c: Canvas, road: float, kerb: float, quiet: tuple[str, ...]) -> None:
    """Paint what stands and moves in a street whose carriageway and kerbs have these (half) widths."""

    def either_side(low: float, high: float) -> float:
        return c.between(low, high) * (1 if c.chance(0.5) else -1)

    def person(z: float) -> None:
        x = either_side(road + 0.4, road + kerb)
        shade(c, x, z, 0.45, 0.3)
        figure(c.front(x, z), "person")

    def riding(z: float) -> None:
        x = either_side(0.8, road - 0.5)
        shade(c, x, z, 0.9, 0.3)
        rider(c.front(x, z).local(0, 0, -1.0 if c.chance(0.5) else 1.0))

    def parked(z: float) -> None:
        two_wheeler(
            c.front(either_side(road + 0.2, road + kerb), z), "bicycle" if c.chance(0.6) else "motorcycle"
        )

    def large(z: float) -> None:
        name = str(c.rng.choice(["bus", "truck", "train"], p=[0.4, 0.4, 0.2]))
        across = c.chance(0.5)
        vehicle(c, name, either_side(0, 5) if across else either_side(1.8, 2.6), z, across)

    def car(z: float) -> None:
        across = c.chance(0.25)
        vehicle(c, "car", either_side(0, 3) if across else either_side(1.6, road - 0.6), z, across)

    def planted(z: float) -> None:
        tree(c.front(either_side(road + 1, road + kerb), z), "vegetation", c.between(4, 7))

    def standing(z: float) -> None:
        post(c.front(either_side(road + 0.3, road + 0.8), z))

    crowd: Crowd = [
        (car, 3, 6, 5, 20),
        (large, 0, 3, 8, 17),
        (person, 3, 7, 4, 13),
        (riding, 1, 4, 4, 11),
        (parked, 0, 4, 4, 9),
        (standing, 3, 7, 4, 14),
        (planted, 0, 3, 9, 25),
    ]
    _populate(c, [entry for entry in crowd if entry[0].__name__ not in quiet])


FURNITURE: dict[str, list[tuple[float, float, float, float, float, float]]] = {
    # parts, far to near: x, z, width, height, depth, base
    "bed": [(0.0, 1.9, 1.6, 1.0, 0.1, 0.0), (0.0, 0.0, 1.6, 0.5, 1.9, 0.0)],
    "sofa": [(0.0, 0.6, 2.0, 0.95, 0.25, 0.0), (0.0, 0.0, 1.7, 0.45, 0.6, 0.0)]
    + [(x, 0.0, 0.25, 0.65, 0.75, 0.0) for x in (-0.95, 0.95)],
    "table": [(x, z, 0.1, 0.65, 0.1, 0.0) for z in (0.75, 0.0) for x in (-0.7, 0.7)]
    + [(0.0, 0.0, 1.6, 0.12, 0.85, 0.65)],
    "chair": [(x, z, 0.07, 0.42, 0.07, 0.0) for z in (0.4, 0.0) for x in (-0.19, 0.19)]
    + [(0.0, 0.4, 0.46, 0.6, 0.07, 0.45), (0.0, 0.0, 0.46, 0.09, 0.45, 0.4)],
    "cabinet": [(0.0, 0.0, 1.1, 1.05, 0.45, 0.0)],
}


def furniture(c: Canvas, name: str, x: float, z: float) -> None:
    """Paint a piece of furniture; all share their fabrics and differ in outline."""
    surface = c.material("fabric")
    shade(c, x, z + 0.4, 0.9 if name in ("bed", "sofa", "table") else 0.5, 0.6)
    for dx, dz, width, height, depth, base in FURNITURE[name]:
        front, _ = block(c, name, surface, x + dx, z + dz, (width, height, depth), base)
        if name == "cabinet":
            for y in (0.1, 0.42, 0.74):
                front.paint(None, SHADOW, box(-0.48, y, 0.48, y + 0.26), opacity=0.3)
                front.paint(None, LIGHT, box(-0.08, y + 0.12, 0.08, y + 0.16))
    if name == "bed":
        c.floor(0.52).paint(
            name, LIGHT, *(box(x + d - 0.32, z + 1.3, x + d + 0.32, z + 1.75) for d in (-0.4, 0.4))
        )
    elif name == "sofa":
        c.front(x, z + 0.58).paint(
            name, surface.lit(1.2), *(box(d - 0.4, 0.47, d + 0.4, 0.85) for d in (-0.43, 0.43))
        )


# body length, body height, leg length, neck length, neck lift (turn fraction)
ANIMALS = {
    "cow": (1.9, 0.85, 0.6, 0.5, 0.03),
    "horse": (1.7, 0.65, 0.95, 0.6, 0.13),
    "sheep": (1.2, 0.75, 0.35, 0.25, 0.08),
}


def animal(c: Canvas, name: str) -> None:
    """Paint a four-legged animal from the side; all share their coats and differ in proportions."""
    length, height, leg, neck, lift = ANIMALS[name]
    coat, y, half = c.material("coat"), leg + height / 2, length / 2
    root = (0.85 * half, y + 0.2 * height)
    nape = (root[0] + neck * np.cos(2 * np.pi * lift), root[1] + neck * np.sin(2 * np.pi * lift))
    nose = (nape[0] + 0.35 * height, nape[1] - 0.15 * height)
    rump, tail = (-half, y + 0.3 * height), (-1.3 * half, y)
    for light, shift in ((0.7, 0.12 * length), (1.0, 0.0)):
        feet = (shift - 0.7 * half, shift + 0.7 * half)
        c.paint(name, coat.lit(light), *(stroke([(x, y), (x, 0)], 0.3 * height, 0.14 * height) for x in feet))
    c.paint(name, coat, disc(0, y, half, height / 2), stroke([root, nape], 0.5 * height, 0.35 * height))
    c.paint(name, coat.lit(1.15), stroke([nape, nose], 0.4 * height, 0.25 * height))
    c.paint(name, coat.lit(0.8), stroke([rump, tail], 0.1 * height))


def _hang(c: Canvas, left: float, right: float) -> None:
    """Paint what a wall carries between two positions: a curtained window, a door or a painting."""
    c = c.local((left + right) / 2, 0)
    kind = c.rng.choice(["window", "door", "painting"], p=[0.5, 0.2, 0.3])
    if kind == "window":
        c.paint("window", LIGHT, box(-0.72, 0.75, 0.72, 2.2))
        panes = [box(x, y, x + 0.62, y + 0.62) for x in (-0.66, 0.04) for y in (0.82, 1.5)]
        c.paint(None, c.material("sky"), *panes)
        drape, spread = c.material("drape"), c.between(0.4, 0.6)
        c.paint("curtain", drape, *(box(x, 0.1, x + spread, 2.35) for x in (-0.95, 0.95 - spread)))
    elif kind == "door":
        c.paint("door", c.material("cloth"), box(-0.5, 0, 0.5, 2.1))
        c.paint(None, SHADOW, *(box(-0.36, y, 0.36, y + 0.8) for y in (0.2, 1.15)), opacity=0.25)
        c.paint(None, LIGHT, disc(0.4, 1.05, 0.05))
    else:
        c.paint("painting", c.material("cloth"), box(-0.6, 1.05, 0.6, 2.0))
        c.paint(None, c.material("carpet"), box(-0.52, 1.13, 0.52, 1.92))


def room(c: Canvas) -> None:
    """Paint a furnished room, seen from one end."""
    half, depth, height = c.between(1.7, 2.3), c.between(3.6, 4.6), c.between(2.4, 2.7)
    c.look((c.aspect / 2 + c.between(-0.12, 0.12), c.between(0.36, 0.46)), 0.95, c.between(1.4, 1.7))
    c.floor(height).paint("ceiling", c.material("ceiling"), box(-half, 0.5, half, depth))
    c.floor().paint("floor", c.material("planks"), box(-half, 0.5, half, depth))
    paper = c.material("paper")
    walls = [c.front(0, depth), c.side(-half, 0), c.side(half, 0)]
    for wall, light, start in zip(walls, (1.0, 0.8, 0.88), (-half, 0.5, 0.5), strict=True):
        end = depth if start > 0 else half
        wall.paint("wall", paper.lit(light), box(start, 0, end, height))
        wall.paint(None, LIGHT, box(start, 0, end, 0.1), opacity=0.7)
        _hang(wall, max(start, end - 2.2), end if start > 0 else 0)
    _hang(walls[0], 0, half)
    if c.chance(0.6):
        c.floor().paint("rug", c.material("carpet"), box(-0.7 * half, depth - 2.9, 0.7 * half, depth - 0.8))

    def main(z: float) -> None:
        name = str(c.rng.choice(["bed", "sofa", "table"]))
        furniture(c, name, c.between(-0.35, 0.35) * half, depth - 2.1 if name == "bed" else z)

    def corner(z: float) -> None:
        x = c.between(0.65, 0.85) * half * (1 if c.chance(0.5) else -1)
        furniture(c, "cabinet" if c.chance(0.5) else "chair", x, z)

    def person(z: float) -> None:
        figure(c.front(c.between(-0.8, 0.8) * half, z), "person")

    _populate(
        c,
        [
            (main, 1, 2, depth - 2.2, depth - 1.2),
            (corner, 1, 3, depth - 2.0, depth - 0.6),
            (person, 0, 2, depth - 1.8, depth - 1.0),
        ],
    )


def landscape(c: Canvas, animals: tuple[str, ...] = ()) -> None:
    """Paint open country: mountains, meadows, water, bare earth, trees, a house, animals."""
    horizon = c.between(0.35, 0.5)
    c.look((c.aspect / 2, horizon), 0.95, c.between(1.8, 2.4))
    sky(c, horizon)
    far = c.front(0, 120)
    if c.chance(0.7):
        x = np.linspace(-110, 110, 60)
        ridge = sum(c.between(2, 9) * np.sin(x / c.between(6, 26) + c.between(0, 6)) for _ in range(4))
        crest = np.maximum(c.between(12, 22) + np.asarray(ridge), 2)
        outline = np.concatenate([np.stack([x, crest], axis=1), [(110, -2), (-110, -2)]])
        far.paint("mountain", c.material("rock"), outline)
    ground = c.floor()
    ground.paint("terrain", c.material("grass"), box(-90, 1.5, 90, 121))
    if c.chance(0.55):
        shore = c.between(5, 9)
        ground.paint("water", c.material("water"), box(-90, shore, 90, c.between(30, 121)))
    if c.chance(0.5):
        bend, width = c.between(-4, 4), c.between(1.2, 2.5)
        ground.paint(
            "earth", c.material("earth"), stroke([(c.between(-2, 2), 1.5), (bend, 7), (3 * bend, 30)], width)
        )
    if c.chance(0.4):
        facade(c.front(c.between(-9, 3), 22), c.between(5, 9), c.between(4, 8))

    def planted(z: float) -> None:
        tree(c.front(c.between(-0.6, 0.6) * c.aspect * z, z), "vegetation", c.between(3.5, 6.5))

    def grazing(z: float) -> None:
        x = c.between(-0.4, 0.4) * c.aspect * z
        shade(c, x, z, 0.8, 0.3)
        animal(c.front(x, z).local(0, 0, 1.0 if c.chance(0.5) else -1.0), str(c.rng.choice(animals)))

    def walking(z: float) -> None:
        figure(c.front(c.between(-0.4, 0.4) * c.aspect * z, z), "person")

    def fenced(z: float) -> None:
        fence(c.front(-30, z), 60, 1.2)

    herd = [(grazing, 2, 6, 3.0, 6)] if animals else []
    _populate(c, [(planted, 2, 7, 6, 24), (walking, 0, 2, 4, 8), (fenced, 0, 2, 7, 12), *herd])


@dataclass(frozen=True)
class Tool:
    """A surgical instrument: every one is a metal shaft, told apart by its tip, width and handle."""

    tip: str
    width: float
    weight: float
    handle: str | None = None
    grip: str = "plain"
    reach: float = 0.4
    """Distance from the tip to the handle, in picture heights."""


TOOLS = {
    "Hydrodissection Cannula": Tool("straight", 0.030, 2, "Hydrodissection Cannula Handle", "plain", 0.45),
    "Viscoelastic Cannula": Tool("bent", 0.032, 2),
    "Capsulorhexis Cystotome": Tool("hook", 0.030, 2, "Capsulorhexis Cystotome Handle", "plain", 0.40),
    "Rycroft Cannula": Tool("bent", 0.032, 2, "Rycroft Cannula Handle", "bands", 0.35),
    "Bonn Forceps": Tool("prongs", 0.080, 6),
    "Primary Knife": Tool("diamond", 0.045, 1, "Primary Knife Handle", "bands", 0.30),
    "Phacoemulsifier Handpiece": Tool("tube", 0.075, 10, "Phacoemulsifier Handpiece Handle", "knurl", 0.35),
    "Lens Injector": Tool("tube", 0.100, 3, "Lens Injector Handle", "plain", 0.45),
    "I/A Handpiece": Tool("tube", 0.060, 9, "I/A Handpiece Handle", "stripes", 0.35),
    "Secondary Knife": Tool("blade", 0.045, 1, "Secondary Knife Handle", "bands", 0.30),
    "Micromanipulator": Tool("hook", 0.040, 4),
    "Capsulorhexis Forceps": Tool("prongs", 0.045, 3),
}


def instrument(c: Canvas, name: str, opacity: float) -> None:
    """Paint an instrument from its tip at the origin along x towards and past the picture's edge."""
    tool, length = TOOLS[name], 1.6
    metal, w = c.material("metal").lit(1.3), TOOLS[name].width
    tips = {
        "straight": [stroke([(0, 0), (0.2, 0)], w * 0.8, w)],
        "bent": [stroke([(0, 0.07), (0.08, 0.0), (0.2, 0)], w * 0.8, w)],
        "hook": [stroke([(0.0, 0.045), (0.01, 0.0), (0.2, 0)], w * 0.8, w)],
        "prongs": [
            stroke([(0, sign * w * 0.6), (0.15, sign * w * 0.5), (0.3, 0)], 0.012, 0.02) for sign in (-1, 1)
        ],
        "tube": [stroke([(0, 0), (0.12, 0)], 0.5 * w, 0.6 * w)],
        "diamond": [np.array([(0, 0), (0.07, 0.035), (0.14, 0), (0.07, -0.035)])],
        "blade": [np.array([(0, -0.03), (0.14, 0.02), (0.14, -0.02)])],
    }
    start = {"prongs": 0.28, "tube": 0.1, "diamond": 0.1, "blade": 0.12}.get(tool.tip, 0.18)
    end = tool.reach if tool.handle else length
    c.paint(name, metal, *tips[tool.tip], stroke([(start, 0), (end, 0)], w), opacity=opacity)
    c.paint(None, LIGHT, box(start, 0.1 * w, end, 0.3 * w), opacity=0.6 * opacity)
    if tool.handle:
        surface = replace(c.material("metal"), texture=tool.grip, period=0.07, contrast=0.45)
        thick = 0.09 + 1.1 * w
        c.paint(
            tool.handle,
            surface,
            stroke([(end, 0), (end + 0.06, 0)], w, thick),
            box(end + 0.05, -thick / 2, length, thick / 2),
        )
        c.paint(None, LIGHT, box(end + 0.05, 0.1 * thick, length, 0.25 * thick), opacity=0.5)


def surgery(c: Canvas) -> None:
    """Paint an eye under the operating microscope: skin, drape, retractors, eye, one to three instruments."""
    x, y = c.aspect / 2 + c.between(-0.15, 0.15), 0.5 + c.between(-0.06, 0.06)
    frame, wide = box(0, 0, c.aspect, 1), c.between(0.62, 0.78)
    c.paint("Skin", c.material("skin"), frame)
    drape = c.material("drape")
    for corner in range(4):
        if c.chance(0.55):
            turn = (corner + 0.5 + c.between(-0.2, 0.2)) * np.pi / 2
            c.local(x, y, 1.0, turn).paint("Surgical Tape", drape, box(c.between(0.62, 0.78), -1.2, 1.6, 1.2))
    c.paint(
        "Cornea",
        c.material("sclera"),
        disc(x, y, wide, 0.4),
    )
    for _ in range(14):
        turn, start = c.between(0, 2 * np.pi), c.between(0.3, 0.36)
        vein = [(x + r * np.cos(turn + 0.3 * r) * wide / 0.5, y + r * np.sin(turn)) for r in (start, 0.42)]
        c.paint(None, Surface((170, 40, 40)), stroke(vein, 0.003, 0.008), opacity=0.35)
    ring, hole = c.between(0.26, 0.31), c.between(0.13, 0.22)
    colour = c.material("paint")
    c.paint("Iris", colour, disc(x, y, ring))
    c.paint(None, SHADOW, stroke(disc(x, y, ring - 0.015), 0.03), opacity=0.5)
    for turn in np.linspace(0, 2 * np.pi, 90):
        spoke = [(x + r * np.cos(turn), y + r * np.sin(turn)) for r in (hole, ring - 0.02)]
        c.paint(None, colour.lit(c.between(0.5, 1.6)), stroke(spoke, 0.008, 0.012), opacity=0.6)
    reflex = c.material("pupil")
    c.paint("Pupil", reflex, disc(x, y, hole))
    c.paint(None, reflex.lit(1.35), disc(x, y, 0.7 * hole), opacity=0.5)
    wire = c.material("metal").lit(1.2)
    for sign in (-1, 1):
        arc = disc(x, y, 0.96 * wide, 0.42, (0.08 + 0.25 * (1 - sign), 0.42 + 0.25 * (1 - sign)))
        c.paint("Eye Retractors", wire, stroke(arc, 0.05))
        c.paint("Eye Retractors", wire, stroke([arc[24], arc[24] + (0.1, sign * 0.3)], 0.04))
    if c.chance(0.3):
        left, glove = c.chance(0.5), c.material("glove")
        palm = c.local(0.0 if left else c.aspect, c.between(0.65, 0.95), 1.0 if left else -1.0)
        palm.paint("Hand", glove, disc(-0.05, 0.1, 0.3, 0.24))
        for lift in (0.16, 0.0, -0.16):
            knuckles = [(0.1, 0.1 + 0.5 * lift), (0.26, 0.04 + 0.8 * lift), (0.4 - abs(lift), 0.08 + lift)]
            palm.paint("Hand", glove.lit(1 + lift), stroke(knuckles, 0.12, 0.09), disc(*knuckles[-1], 0.045))
    weights = np.array([tool.weight for tool in TOOLS.values()])
    names = c.rng.choice(list(TOOLS), size=c.rng.integers(2, 4), replace=False, p=weights / weights.sum())
    first = c.between(0, 2 * np.pi)
    for i, name in enumerate(names):
        turn = first + i * c.between(1.4, 2.4)
        tip = c.local(x + c.between(-0.2, 0.2), y + c.between(-0.12, 0.12), 1.0, turn)
        instrument(tip, str(name), 0.5 if c.chance(0.12) else 1.0)
    for _ in range(c.rng.integers(1, 4)):
        c.paint(
            None, LIGHT, disc(x + c.between(-0.2, 0.2), y + c.between(-0.2, 0.2), 0.02, 0.013), opacity=0.9
        )
