"""Where nodes and groups of the open graph lie, as the browser draws them, and which of them cover one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

TITLE = 30.0  # height of a node's title, which lies above its position
ROUNDING = 2.0  # pixels of the graph

_MEASURE = """() => {
  const {graph, canvas} = window.app, {scale, offset} = canvas.ds, at = canvas.canvas.getBoundingClientRect();
  const inGraph = (box) => [(box.left - at.left) / scale - offset[0], (box.top - at.top) / scale - offset[1],
    box.width / scale, box.height / scale];
  const joined = (one, other) => { if (!other[2] || !other[3]) return one;
    const left = Math.min(one[0], other[0]), top = Math.min(one[1], other[1]);
    return [left, top, Math.max(one[0] + one[2], other[0] + other[2]) - left,
      Math.max(one[1] + one[3], other[1] + other[3]) - top]; };
  const nodes = graph._nodes.map(node => {
    const html = document.querySelector(`[data-node-id="${node.id}"]`);
    let box = html ? inGraph(html.getBoundingClientRect())
      : [node.pos[0], node.pos[1] - %TITLE%, node.size[0], node.size[1] + %TITLE%];
    for (const widget of html ? [] : node.widgets ?? [])
      if (widget.element?.checkVisibility?.()) box = joined(box, inGraph(widget.element.getBoundingClientRect()));
    return {id: Number(node.id), title: node.type, box};
  });
  const groups = (graph._groups ?? []).map((group, index) => ({id: -1 - index, title: group.title,
    box: [group.pos[0], group.pos[1], group.size[0], group.size[1]]}));
  return [...nodes, ...groups];
}""".replace("%TITLE%", str(TITLE))


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A node (id from 1 on) or a group (id below 0) with its title bar, in pixels of the graph."""

    id: int
    title: str
    left: float
    top: float
    width: float
    height: float

    def covers(self, other: Rectangle) -> bool:
        """Whether the two share more than their edges."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        down = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return across > ROUNDING and down > ROUNDING

    def holds(self, other: Rectangle) -> bool:
        """Whether all of `other` lies in this one."""
        return (
            self.left <= other.left + ROUNDING
            and self.top <= other.top + ROUNDING
            and self.left + self.width >= other.left + other.width - ROUNDING
            and self.top + self.height >= other.top + other.height - ROUNDING
        )


def show_all(page: Page) -> None:
    """Zoom so that the whole graph is in sight, as nodes outside are not drawn."""
    page.evaluate(
        """() => { const {graph, canvas} = window.app; let box = [1e9, 1e9, -1e9, -1e9];
        for (const {pos, size} of graph._nodes) box = [Math.min(box[0], pos[0]), Math.min(box[1], pos[1] - 40),
            Math.max(box[2], pos[0] + size[0]), Math.max(box[3], pos[1] + size[1])];
        const {clientWidth, clientHeight} = canvas.canvas;
        const scale = Math.min(clientWidth / (box[2] - box[0] + 200), clientHeight / (box[3] - box[1] + 200), 1);
        canvas.ds.scale = scale;
        canvas.ds.offset = [100 - box[0], 100 - box[1]];
        canvas.setDirty(true, true); }"""
    )
    page.wait_for_timeout(400)


def measure(page: Page) -> list[Rectangle]:
    """All nodes and groups of the open graph."""
    return [
        Rectangle(id=one["id"], title=one["title"], left=left, top=top, width=width, height=height)
        for one in page.evaluate(_MEASURE)
        for left, top, width, height in [one["box"]]
    ]


def collisions(found: list[Rectangle]) -> list[str]:
    """Pairs of nodes that cover one another, and of groups and nodes that lie across each other's edge."""
    out = []
    for number, one in enumerate(found):
        for other in found[:number]:
            if not one.covers(other):
                continue
            group, inner = (one, other) if one.id < 0 else (other, one)
            if group.id > 0 or inner.id < 0 or not group.holds(inner):
                out.append(f"{other.title} {other.id} and {one.title} {one.id}")
    return out
