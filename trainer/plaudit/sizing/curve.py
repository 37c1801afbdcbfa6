"""The curve of an advice as an SVG picture: replicas along, the trainers' wait up, the chosen number marked."""

import math

from plaudit.sizing.advice import Advice

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 48
INK, SOFT, LINE, MARK = "#1c2430", "#5b6675", "#1f6feb", "#b3541e"


def svg_of(advice: Advice) -> str:
    """The picture, whole. Replicas have a logarithmic axis, so that 1 to 1,000 fit."""
    points = [(point.replicas, point.figures.wait_share) for point in advice.points]
    most = max(replicas for replicas, _ in points)
    highest = max(max(wait for _, wait in points), 2 * advice.target_share)

    def x(replicas: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(replicas) / max(1.0, math.log2(most))

    def y(wait: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * wait / highest

    def text(left: float, top: float, words: str, *, anchor: str = "middle", colour: str = SOFT) -> str:
        return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    target = y(advice.target_share)
    path = " ".join(f"{'M' if number == 0 else 'L'}{x(r):.1f},{y(w):.1f}" for number, (r, w) in enumerate(points))
    shapes = [
        text(LEFT, 22, f"wait for rewards, {advice.trainers} trainers", anchor="start", colour=INK),
        f'<line x1="{LEFT}" y1="{target:.1f}" x2="{WIDTH - RIGHT}" y2="{target:.1f}" stroke="{MARK}" '
        'stroke-dasharray="4 4"/>',
        text(WIDTH - RIGHT, target - 6, f"{advice.target_share:.0%}", anchor="end", colour=MARK),
        f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="2"/>',
    ]
    for replicas, wait in points:
        colour = MARK if replicas == advice.replicas else LINE
        shapes.append(f'<circle cx="{x(replicas):.1f}" cy="{y(wait):.1f}" r="4" fill="{colour}"/>')
        shapes.append(text(x(replicas), y(wait) - 9, f"{wait:.1%}"))
        shapes.append(text(x(replicas), HEIGHT - BOTTOM + 18, str(replicas)))
    shapes.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "replicas"))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="wait by number of replicas">\n{body}\n</svg>\n'
    )
