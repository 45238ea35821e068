"""What nodes are called, also when they are gone."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.scheduling.jobs import Backend, Resources


class NodeNames:
    """Names by node id. Each stays what it was when it was first seen."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._names: dict[str, str] = {}

    def __call__(self, node: str) -> str:
        if node not in self._names:
            self.there()
        return self._names.get(node) or self._backend.name(node)

    def there(self) -> Mapping[str, Resources]:
        """The devices of each living node, by its name."""
        nodes = self._backend.nodes()
        for node in nodes.keys() - self._names.keys():
            self._names[node] = self._backend.name(node)
        return {self._names[node]: devices for node, devices in nodes.items()}
