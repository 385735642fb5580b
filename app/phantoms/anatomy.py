"""The anatomy of the phantoms: a canvas with pose and warp, and the painters of torso, organs, vessels and bones.

Lengths are mm around the dome of the diaphragm (x Right, y Anterior, z Superior); organs are ellipsoids, tubes and
shells with edges blended over one voxel. Says nothing about findings, files or cohorts: those are phantoms.py's.
"""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from transforms.windows import Number

SIGN_OF_X = {"right": 1.0, "left": -1.0}  # x points to the patient's right
Point = tuple[Number, Number, Number]


@dataclass(frozen=True)
class Build:
    """What differs from patient to patient, drawn once. Lengths in mm, values in HU."""

    width: float  # half width and half depth of the chest
    depth: float
    fat: float  # under the skin
    dome: float  # height of the right diaphragm
    organ: float  # size of organs
    heart: float
    blood: float
    liver: float
    spleen: float
    kidney: float
    bone: float
    lung: float
    rng: np.random.Generator = field(repr=False)

    @property
    def back(self) -> float:
        """Where the muscles of the back begin."""
        return -(self.depth - self.fat)

    @property
    def spine(self) -> float:
        return self.back + 52

    def near(self, value: Number, spread: Number) -> float:
        return value + float(self.rng.uniform(-spread, spread))


def draw_build(rng: np.random.Generator) -> Build:
    """A patient: thin or stout, with or without contrast medium in the blood."""
    contrast = rng.random() < 0.5
    phase = rng.uniform(0.5, 1.0) if contrast else 0.0
    stout = rng.uniform(0, 1)
    return Build(
        width=138 + 30 * stout + rng.uniform(-5, 5),
        depth=96 + 26 * stout + rng.uniform(-4, 4),
        fat=8 + 16 * stout + rng.uniform(-2, 4),
        dome=rng.uniform(-18, 22),
        organ=rng.uniform(0.88, 1.12),
        heart=rng.uniform(0.85, 1.2),
        blood=42 + 150 * phase,
        liver=rng.uniform(48, 64) + 50 * phase,
        spleen=rng.uniform(42, 52) + 75 * phase,
        kidney=rng.uniform(28, 38) + 160 * phase,
        bone=rng.uniform(140, 260),
        lung=rng.uniform(-890, -790),
        rng=rng,
    )


class Canvas:
    """A volume being painted: HU, and for each voxel its place in the patient after pose and warp."""

    def __init__(self, size: int, spacing: Number, rng: np.random.Generator) -> None:
        self.step = spacing
        self.axis = ((np.arange(size) - (size - 1) / 2) * spacing).astype(np.float32)
        self.hu = np.full((size, size, size), -1000, np.float32)
        x, y, z = np.meshgrid(self.axis, self.axis, self.axis, indexing="ij", sparse=True)
        turn, lean = np.deg2rad(rng.uniform(-5, 5)), rng.uniform(-0.04, 0.04)
        self.shift = rng.uniform(-8, 8, 3).astype(np.float32)
        dx, dy, dz = x - self.shift[0] - lean * z, y - self.shift[1], z - self.shift[2]
        self.x = (np.cos(turn) * dx + np.sin(turn) * dy + self._wave(rng)).astype(np.float32)
        self.y = (np.cos(turn) * dy - np.sin(turn) * dx + self._wave(rng)).astype(np.float32)
        self.z = (dz + self._wave(rng)).astype(np.float32)

    def _wave(self, rng: np.random.Generator) -> np.ndarray:
        """A smooth displacement of a few mm: organs are no ellipsoids."""
        total = np.zeros(self.hu.shape, np.float32)
        for _ in range(3):
            waves = [
                np.cos(self.axis * (2 * np.pi / rng.uniform(110, 320)) + rng.uniform(0, 2 * np.pi)) for _ in range(3)
            ]
            total += rng.uniform(1.0, 3.0) * np.einsum("i,j,k->ijk", *waves).astype(np.float32)
        return total

    def region(self, center: Point, reach: Point) -> tuple[slice, slice, slice]:
        """Voxels that may lie within `reach` of a place, pose and warp allowed for."""
        slices = []
        for axis in range(3):
            margin = 14 + 0.1 * (abs(center[0]) + abs(center[1]) + reach[0] + reach[1]) + 0.04 * abs(center[2])
            middle = center[axis] + float(self.shift[axis])
            low, high = np.searchsorted(self.axis, [middle - reach[axis] - margin, middle + reach[axis] + margin])
            slices.append(slice(int(low), int(high)))
        return tuple(slices)

    def in_scan(self, place: Point) -> Point:
        """Where a place in the patient lies in the scan, in mm: pose and warp undone, to a fraction of a voxel."""
        axes = (self.x, self.y, self.z)
        away = sum((axis - at) ** 2 for axis, at in zip(axes, place, strict=True))
        nearest = np.unravel_index(int(np.argmin(away)), away.shape)
        return tuple(float(self.axis[i] + at - axis[nearest]) for i, axis, at in zip(nearest, axes, place, strict=True))

    def blend(self, part: np.ndarray, value: Number | np.ndarray, where: tuple = (slice(None),) * 3) -> None:
        self.hu[where] += part * (value - self.hu[where])

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Share of each voxel inside a surface at signed distance `distance` mm."""
        return np.clip(0.5 - distance / self.step, 0, 1)

    def ellipsoid(
        self,
        center: Point,
        radii: Point,
        value: Number,
        *,
        within: np.ndarray | None = None,
        above: Number | None = None,
        lean: Number = 0,
    ) -> None:
        """Paints an ellipsoid; `above` keeps its part in front of that y (gas rises), `lean` slants x with z."""
        where = self.region(center, tuple(r + abs(lean) * radii[2] for r in radii))
        x, y, z = self.x[where] - center[0], self.y[where] - center[1], self.z[where] - center[2]
        distance = ellipsoid_distance(x - lean * z, y, z, radii)
        if above is not None:
            distance = np.maximum(distance, above - self.y[where])
        part = self.cover(distance)
        self.blend(part if within is None else part * within[where], value, where)

    def tube(self, points: list[Point], radius: Number, value: Number, *, within: np.ndarray | None = None) -> None:
        """Paints capsules along a polyline."""
        for start, end in itertools.pairwise(points):
            a, b = np.array(start, np.float32), np.array(end, np.float32)
            where = self.region(tuple(((a + b) / 2).tolist()), tuple((np.abs(b - a) / 2 + radius).tolist()))
            x, y, z = self.x[where] - a[0], self.y[where] - a[1], self.z[where] - a[2]
            along = b - a
            t = np.clip((x * along[0] + y * along[1] + z * along[2]) / max(float(along @ along), 1e-6), 0, 1)
            distance = np.sqrt((x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2) - radius
            part = self.cover(distance)
            self.blend(part if within is None else part * within[where], value, where)


def ellipsoid_distance(x: np.ndarray, y: np.ndarray, z: np.ndarray, radii: Point) -> np.ndarray:
    """Distance to an ellipsoid along the ray from its centre, negative inside."""
    q = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    rho = np.sqrt(x * x + y * y + z * z)
    return np.where(q < 0.05, -min(radii), rho - rho / np.maximum(q, 0.05))


def oval_distance(x: np.ndarray, y: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    """Distance to a rounded box in each axial plane, along the ray from its centre."""
    q = ((np.abs(x) / half_x) ** 2.4 + (np.abs(y) / half_y) ** 2.4) ** np.float32(1 / 2.4)
    rho = np.sqrt(x * x + y * y)
    return np.where(q < 0.05, -np.minimum(half_x, half_y), rho - rho / np.maximum(q, 0.05))


def _bump(z: np.ndarray, middle: Number, width: Number) -> np.ndarray:
    return np.exp(-(((z - middle) / width) ** 2))


class Torso(NamedTuple):
    """Regions that organs are clipped to: share of each voxel inside."""

    lungs: np.ndarray
    below: np.ndarray  # cavity under the diaphragm
    wall: np.ndarray  # signed distance to the cavity's wall, mm


def paint_torso(canvas: Canvas, build: Build) -> Torso:
    """Body, fat, muscle, the cavity and the lungs in it."""
    x, y, z = canvas.x, canvas.y, canvas.z
    shape = 1 + 0.07 * _bump(z, 130, 70) - 0.07 * _bump(z, -90, 60) + 0.06 * _bump(z, -200, 60)
    half_x, half_y = build.width * shape, build.depth * (1 - 0.16 * _bump(z, 200, 60)) * (0.97 + 0.03 * shape)
    skin = oval_distance(x, y, half_x, half_y)
    if build.rng.random() < 0.5:
        for sign in SIGN_OF_X.values():
            place = (sign * 0.48 * build.width, build.depth - 12, build.near(75, 10))
            breast = ellipsoid_distance(x - place[0], y - place[1], z - place[2], (52, 34, 46))
            skin = np.minimum(skin, breast)
    canvas.blend(canvas.cover(skin), 20)
    canvas.blend(canvas.cover(skin + 3), build.near(-105, 8))
    muscle = oval_distance(x, y, half_x - build.fat, half_y - build.fat)
    canvas.blend(canvas.cover(muscle), build.near(52, 6))
    narrow = 1 - 0.75 * np.clip((z - 60) / 125, 0, 1) ** 2.2  # the chest closes towards the apex
    thick = 15 + 14 * np.clip((z - 60) / 100, 0, 1)
    wall = oval_distance(
        x, y - 2, (half_x - build.fat - thick) * narrow, (half_y - build.fat - 15) * (0.4 + 0.6 * narrow)
    )
    wall = np.maximum(wall, z - 172)
    cavity = canvas.cover(wall)
    canvas.blend(cavity, build.near(-100, 8))

    side = np.where(x > 0, build.dome, build.dome - build.near(14, 6))
    u = ((np.abs(x) - 68) / 78) ** 2 + ((y - 12) / 88) ** 2
    below = (side - 34 * u - 16 * u * u) - z  # positive under the diaphragm
    half_mediastinum = (26 + 16 * _bump(z, 40, 50)) * (1 - 0.55 * np.clip((y - 25) / 60, 0, 1))
    middle = np.abs(x + 6 * _bump(z, 40, 60)) - half_mediastinum
    lung = np.maximum(np.maximum(wall + 2, 0.8 * below), -middle)
    lungs = canvas.cover(lung)
    return Torso(lungs, cavity * canvas.cover(-below), wall)


def paint_abdomen(canvas: Canvas, build: Build, torso: Torso) -> None:
    """Liver, spleen, stomach, kidneys' surroundings, pancreas and bowel, clipped to the space under the diaphragm."""
    b, k, dome = build, build.organ, build.dome
    inside = torso.below
    for _ in range(26):  # bowel first: organs press it aside
        place = (b.near(0, 95), b.near(38, 32), b.near(-150, 45))
        radius = b.near(17, 4)
        canvas.ellipsoid(place, (radius, radius, radius * b.near(1.3, 0.3)), b.near(28, 14), within=inside)
        if b.rng.random() < 0.25:
            gas = (radius - 4,) * 3
            canvas.ellipsoid(place, gas, -850, within=inside, above=place[1])
    for sign, top in ((1, -105), (-1, -75)):
        for height in np.arange(top, -200, -26):
            place = (sign * b.near(0.66, 0.03) * b.width, b.near(2, 8), float(height))
            canvas.ellipsoid(place, (19, 20, 17), b.near(35, 20), within=inside)
            canvas.ellipsoid(place, (14, 15, 13), -700, within=inside, above=place[1] + 2)
    stomach = (b.near(-52, 8), b.near(34, 8), dome - b.near(62, 8))
    canvas.ellipsoid(stomach, (44 * k, 36 * k, 46 * k), 42, within=inside)
    canvas.ellipsoid(stomach, (39 * k, 31 * k, 41 * k), b.near(18, 15), within=inside)
    canvas.ellipsoid(stomach, (39 * k, 31 * k, 41 * k), -900, within=inside, above=stomach[1] + b.near(14, 8))
    canvas.ellipsoid(
        (b.near(-96, 6), b.near(-32, 6), dome - 58), (32 * k, 46 * k, 47 * k), b.spleen, within=inside, lean=0.15
    )
    canvas.tube([(38, 22, dome - 108), (0, 18, dome - 92), (-62, -8, dome - 74)], 11 * k, 45, within=inside)
    canvas.ellipsoid(
        (b.near(70, 5), b.near(0, 6), dome - 54), (86 * k, 84 * k, 66 * k), b.liver, within=inside, lean=-0.18
    )
    canvas.ellipsoid((b.near(2, 8), 42, dome - 44), (62 * k, 34 * k, 32 * k), b.liver, within=inside)
    for _ in range(4):
        a = (b.near(60, 20), b.near(0, 20), dome - 45)
        canvas.tube(
            [(34, 5, dome - 62), a, (b.near(95, 20), b.near(0, 40), dome - b.near(50, 25))], 4.5, b.blood, within=inside
        )
    canvas.ellipsoid((b.near(52, 6), b.near(50, 6), dome - 102), (15, 18, 26), 8, within=inside)
    for sign in SIGN_OF_X.values():
        canvas.tube([(sign * 34, b.spine + 4, dome - 90), (sign * 52, b.spine + 14, -200)], 20, 55)


def kidney_center(build: Build, side: str) -> Point:
    return (SIGN_OF_X[side] * 64, build.spine - 2, build.dome - (118 if side == "right" else 104))


def paint_kidneys(canvas: Canvas, build: Build) -> None:
    """Two beans in fat, each with a sinus of fat turned to the middle."""
    for side, sign in SIGN_OF_X.items():
        x, y, z = kidney_center(build, side)
        k = build.organ
        canvas.ellipsoid((x, y, z), (34 * k, 31 * k, 62 * k), -100, lean=-sign * 0.2)
        canvas.ellipsoid((x, y, z), (28 * k, 25 * k, 54 * k), build.kidney, lean=-sign * 0.2)
        canvas.ellipsoid((x - sign * 13, y + 4, z), (14 * k, 9 * k, 24 * k), -70, lean=-sign * 0.2)


def paint_chest(canvas: Canvas, build: Build, torso: Torso) -> None:
    """Lungs with their vessels, airways, the heart and the great vessels."""
    b = build
    gravity = np.clip((-canvas.y - 20) / 90, -0.6, 1) * 45  # the back of a lying patient's lung is denser
    canvas.blend(torso.lungs, b.lung + gravity)
    for sign in SIGN_OF_X.values():
        root = (sign * 30, -6, 78)
        for _ in range(11):
            far = (sign * b.near(88, 28), b.near(-8, 62), b.near(75, 80))
            knee = tuple(r + 0.5 * (f - r) + b.near(0, 9) for r, f in zip(root, far, strict=True))
            canvas.tube([root, knee], 4.6, b.near(20, 20), within=torso.lungs)
            canvas.tube([knee, far], 2.9, b.near(0, 20), within=torso.lungs)
            for _ in range(2):
                twig = tuple(f + b.near(0, 26) for f in far)
                canvas.tube([knee, twig], 2.2, -50, within=torso.lungs)
    s = b.heart
    heart = (b.near(-24, 5), b.near(30, 5), b.dome - 8 + 50 * s)
    canvas.ellipsoid(heart, (61 * s, 46 * s, 53 * s), 55 + 0.4 * (b.blood - 42), lean=0.25)
    canvas.ellipsoid((heart[0] - 20 * s, heart[1] - 6, heart[2] - 6), (22 * s, 20 * s, 30 * s), b.blood, lean=0.25)
    canvas.ellipsoid((heart[0] + 20 * s, heart[1] + 14, heart[2]), (22 * s, 18 * s, 32 * s), b.blood, lean=0.25)
    canvas.ellipsoid((heart[0] + 4, heart[1] - 30 * s, heart[2] + 20), (30 * s, 14 * s, 20 * s), b.blood)
    side = b.spine + 26
    canvas.tube(
        [(2, 26, b.dome + 70), (12, 24, 118), (2, 10, 134), (-14, side - 6, 124), (-16, side, 90), (-12, side, -205)],
        13,
        b.blood,
    )
    canvas.tube([(-6, 34, 92), (-8, 16, 98)], 14, b.blood)
    canvas.tube([(-42, -2, 88), (-8, 16, 98), (42, -4, 84)], 10, b.blood)
    canvas.tube([(28, 14, 175), (26, 12, b.dome + 60)], 9, b.blood)
    canvas.tube([(24, side, b.dome + 30), (22, side, -205)], 11, b.blood * 0.9 + 4)
    canvas.tube([(-6, b.spine + 26, 190), (-4, b.spine + 26, b.dome - 20)], 7, 38)
    canvas.tube([(0, 2, 200), (0, -8, 104)], 11, 30)
    canvas.tube([(0, 2, 200), (0, -8, 104)], 8.5, -990)
    for sign in SIGN_OF_X.values():
        canvas.tube([(0, -8, 104), (sign * 38, -14, 78)], 6, -980)


def paint_bones(canvas: Canvas, build: Build, torso: Torso) -> None:
    """Spine, ribs, sternum, collar bones, shoulder blades, the crests of the pelvis."""
    b, x, y, z = build, canvas.x, canvas.y, canvas.z
    for sign in SIGN_OF_X.values():
        canvas.tube([(sign * 26, b.back + 11, 200), (sign * 28, b.back + 12, -200)], 17, 55)
    pitch, start = b.near(29, 1.5), b.near(0, 14)
    level = np.abs(np.mod(z - start, pitch) - pitch / 2)  # 0 in the middle of a vertebra
    column = ellipsoid_distance(x, y - b.spine, np.zeros(1, np.float32), (20, 16, 1))
    canvas.blend(canvas.cover(column), 75)
    body = np.maximum(column, level - (pitch / 2 - 3.5))
    canvas.blend(canvas.cover(body), b.bone + 250)
    canvas.blend(canvas.cover(body + 4), b.bone)
    arch = np.abs(ellipsoid_distance(x, y - (b.spine - 24), np.zeros(1, np.float32), (13, 12, 1))) - 4
    canvas.blend(canvas.cover(np.maximum(arch, level - 10)), b.bone + 250)
    canvas.blend(canvas.cover(ellipsoid_distance(x, y - (b.spine - 24), np.zeros(1, np.float32), (9, 8, 1))), 25)
    process = np.maximum(np.abs(x) - 4, np.maximum(np.abs(y - (b.spine - 44)) - 10, level - 9))
    wings = np.maximum(np.abs(np.abs(x) - 26) - 14, np.maximum(np.abs(y - (b.spine - 24)) - 5, level - 7))
    canvas.blend(canvas.cover(np.minimum(process, wings)), b.bone + 200)

    gap, slope = b.near(27, 1), b.near(0.5, 0.06)
    slant = z + slope * (y - b.back)  # a rib falls as it runs forward
    rib = np.hypot(torso.wall - 6, 0.85 * (np.mod(slant, gap) - gap / 2)) - 5.0
    rib = np.maximum(rib, np.maximum(-35 - 0.3 * (b.depth - y) - z, slant - 232))
    rib = np.maximum(rib, 14 - np.abs(x))
    front = np.clip((y - 0.42 * b.depth) / 12, 0, 1)
    canvas.blend(canvas.cover(rib), (b.bone + 260) * (1 - front) + 115 * front)
    canvas.ellipsoid((0, 0.93 * (b.depth - b.fat) - 6, 92), (19, 8, 72), b.bone)
    inside = canvas.cover(torso.wall * 0 - 1)
    for sign in SIGN_OF_X.values():
        canvas.tube([(sign * 16, 42, 158), (sign * 70, 30, 174), (sign * 125, 0, 178)], 6, b.bone + 250)
        canvas.ellipsoid(
            (sign * 0.64 * b.width, b.back + 16, 118), (40, 6, 58), b.bone + 200, within=inside, lean=sign * 0.3
        )
        crest = ellipsoid_distance(x - sign * 72, y + 18, z + 218, (62, 62, 66))
        crest = np.maximum(np.abs(crest) - 5, np.maximum(y - 42, 30 - sign * x))
        canvas.blend(canvas.cover(crest), b.bone + 230)
