"""The devices of a cluster: what each node has, what of it is held, and where a shape fits best.

Nodes that have the same left are alike, and there are few kinds of them however many there are: finding room costs as
much for a thousand nodes as for ten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.scheduling.jobs import Resources, Shape

NOTHING = Resources()


class Pool:
    """Nodes, and what jobs hold of them."""

    def __init__(self) -> None:
        self.nodes: Mapping[str, Resources] = {}
        self.total = NOTHING  # of all nodes
        self._held: dict[str, dict[str, Resources]] = {}  # by node and job; also of nodes that are gone
        self._free: dict[str, Resources] = {}
        self._alike: dict[Resources, dict[str, None]] = {}  # what is free -> its nodes, in order of coming
        self._can_fit: dict[Shape, bool] = {}

    def set_nodes(self, nodes: Mapping[str, Resources]) -> bool:
        """These are the nodes now. Returns whether that is news."""
        if nodes is self.nodes or nodes == self.nodes:
            return False
        self.nodes, self.total = nodes, sum(nodes.values(), NOTHING)
        self._can_fit.clear()
        self._free.clear()
        self._alike.clear()
        for node in nodes:
            self._note(node)
        return True

    def take(self, node: str, job: str, resources: Resources) -> None:
        self._held.setdefault(node, {})[job] = resources
        self._note(node)

    def give(self, node: str, job: str) -> None:
        del self._held[node][job]
        self._note(node)

    def free(self, node: str) -> Resources:
        return self._free[node]

    def find(self, shape: Shape, allowed: Callable[[str], bool] = lambda node: True) -> tuple[str, ...] | None:
        """The nodes with the least left that have room for the shape; None where there are not enough of them."""
        found: list[str] = []
        fitting = [left for left in self._alike if shape.per_node.fits_in(left)]
        for left in sorted(fitting, key=lambda left: (left.gpus, left.cpus)):
            for node in self._alike[left]:
                if allowed(node):
                    found.append(node)
                    if len(found) == shape.num_nodes:
                        return tuple(found)
        return None

    def could_hold(self, shape: Shape) -> bool:
        """Would there be room, were the nodes empty?"""
        if shape not in self._can_fit:
            self._can_fit[shape] = can_ever_fit(shape, self.nodes)
        return self._can_fit[shape]

    def _note(self, node: str) -> None:
        """Work out anew what is free of a node."""
        before = self._free.pop(node, None)
        if before is not None:
            del self._alike[before][node]
            if not self._alike[before]:
                del self._alike[before]
        if node in self.nodes:
            left = self.nodes[node] - sum(self._held.get(node, {}).values(), NOTHING)
            self._free[node] = left
            self._alike.setdefault(left, {})[node] = None


def can_ever_fit(shape: Shape, nodes: Mapping[str, Resources]) -> bool:
    """Are there nodes enough of that size, were they empty?"""
    found = 0
    for total in nodes.values():
        found += shape.per_node.fits_in(total)
        if found >= shape.num_nodes:
            return True
    return False
