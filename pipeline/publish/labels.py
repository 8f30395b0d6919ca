"""Labels beside points that cover neither one another nor a point.

Greedy: points from left to right, each label at the first of a few places around its point that is free and inside
the axes; the place with the least overlap when none is free. A label that had to move away is tied to its point by a
thin line, and so is one whose point has another so near that it could be that one's. Cost: places x labels^2
rectangles, for a dozen labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_GAP_PT = 9.0
_NEAR = (
    (_GAP_PT, 0.0),
    (-_GAP_PT, 0.0),
    (0.0, _GAP_PT),
    (0.0, -_GAP_PT),
    (_GAP_PT, _GAP_PT),
    (_GAP_PT, -_GAP_PT),
    (-_GAP_PT, _GAP_PT),
    (-_GAP_PT, -_GAP_PT),
)
_FAR = tuple(
    (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
    for radius in (30.0, 55.0, 80.0, 110.0)
    for angle in (40, -40, 140, -140, 75, -75, 105, -105, 10, -10, 170, -170)
)
_POINT_RADIUS_PX = 11.0
_LINE_RADIUS_PX = 3.0
_DOT_RADIUS_PX = 8.0
_MARGIN_PX = 5.0
_CROWD_PX = 28.0
_NEIGHBOUR_PX = 100.0
_CROSSING_PX2 = 400.0
"""What a line through a point or label costs, as overlapping pixels."""
_LINE_STEPS = 24
_FONT_SIZE = 9


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str], avoid_x: float
) -> list[Bbox]:
    """Write a label beside each point and return the boxes taken, in pixels and in the order of the points.

    The axes' limits and scales must be final. Points are in data coordinates; at ``avoid_x`` a vertical line stands.
    """
    from matplotlib.transforms import Bbox

    # The layout decides where data lands in pixels, so it has to be done before anything is measured.
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    frame, radius = axes.get_window_extent(), _POINT_RADIUS_PX
    line_x = float(axes.transData.transform((avoid_x, axes.get_ylim()[1]))[0])
    centres = [(float(x), float(y)) for x, y in map(axes.transData.transform, points)]
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    taken.append(Bbox.from_extents(line_x - _LINE_RADIUS_PX, frame.y0, line_x + _LINE_RADIUS_PX, frame.y1))
    boxes: dict[int, Bbox] = {}
    for i in sorted(range(len(points)), key=lambda i: centres[i]):
        others = [centre for j, centre in enumerate(centres) if j != i]
        dots = [other for other in others if math.dist(centres[i], other) > _DOT_RADIUS_PX]
        best_cost, best_offset = math.inf, _FAR[0]
        for offset in _places(centres[i], others):
            note = _annotate(axes, points[i], labels[i], colours[i], offset)
            box = _text_box(note).padded(_MARGIN_PX)
            note.remove()
            cost = _outside(box, frame) + sum(_overlap(box, other) for other in taken)
            if offset in _FAR:
                cost += _CROSSING_PX2 * _crossings(_line(centres[i], box), dots, list(boxes.values()))
            if cost < best_cost:
                best_cost, best_offset = cost, offset
            if cost == 0:
                break
        boxes[i] = _text_box(_annotate(axes, points[i], labels[i], colours[i], best_offset))
        taken.append(boxes[i])
        if best_offset in _FAR:
            taken += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in _line(centres[i], boxes[i])]
    return [boxes[i] for i in range(len(points))]


def _places(centre: tuple[float, float], others: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the offsets to try, in points: near ones unless the point is crowded, then far ones.

    At each distance those that lead away from the neighbours come first, so that lines do not cross.
    """
    neighbours = [other for other in others if math.dist(centre, other) < _NEIGHBOUR_PX]
    if not neighbours:
        return (*_NEAR, *_FAR)
    away_x = sum(centre[0] - x for x, _ in neighbours)
    away_y = sum(centre[1] - y for _, y in neighbours)

    def turn(offset: tuple[float, float]) -> tuple[int, float]:
        angle = math.atan2(offset[1], offset[0]) - math.atan2(away_y, away_x)
        return round(math.hypot(*offset)), round(abs(math.remainder(angle, math.tau)), 6)

    far = sorted(_FAR, key=turn)
    is_crowded = any(math.dist(centre, other) < _CROWD_PX for other in neighbours)
    return tuple(far) if is_crowded else (*_NEAR, *far)


def _annotate(
    axes: Axes, point: tuple[float, float], label: str, colour: str, offset: tuple[float, float]
) -> Annotation:
    dx, dy = offset
    is_far = offset not in _NEAR
    is_steep = abs(dx) < 0.6 * abs(dy)
    note = axes.annotate(
        label,
        point,
        xytext=offset,
        textcoords="offset points",
        fontsize=_FONT_SIZE,
        color=colour,
        ha="center" if dx == 0 or (is_far and is_steep) else "left" if dx > 0 else "right",
        va="center" if dy == 0 or (is_far and not is_steep) else "bottom" if dy > 0 else "top",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
        if is_far
        else None,
    )
    # The layout must not make room for it: that would move the points.
    note.set_in_layout(False)
    return note


def _text_box(note: Annotation) -> Bbox:
    """Return the box of the text alone, without the line that ties it to its point."""
    from matplotlib.text import Text

    note.get_window_extent()  # moves the text to where it will be drawn
    return Text.get_window_extent(note)


def _line(centre: tuple[float, float], box: Bbox) -> list[tuple[float, float]]:
    """Return points on the straight line from a point to its label's box, in pixels."""
    end = min(max(centre[0], box.x0), box.x1), min(max(centre[1], box.y0), box.y1)
    steps = [(k + 1) / _LINE_STEPS for k in range(_LINE_STEPS)]
    return [(centre[0] + step * (end[0] - centre[0]), centre[1] + step * (end[1] - centre[1])) for step in steps]


def _crossings(line: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]], boxes: Sequence[Bbox]) -> int:
    """Return how many dots and labels a line runs into."""
    hit_dots = sum(any(math.dist(dot, point) < _DOT_RADIUS_PX for point in line) for dot in dots)
    return hit_dots + sum(any(box.contains(*point) for point in line) for box in boxes)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    return box.width * box.height - _overlap(box, frame)
