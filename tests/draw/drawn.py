"""What Graphviz reads in a graph: by the program dot, or by pygraphviz where there is none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from sffx.draw.render import render

if TYPE_CHECKING:
    from graphviz import Digraph


@dataclass(frozen=True)
class DrawnNumber:
    """Attributes of a graph, of its nodes and subgraphs by name, and of its edges.

    Each edge knows the names of its ends, "tail" and "head".
    """

    attributes: dict[str, Any]
    nodes: dict[str, dict[str, Any]]
    subgraphs: dict[str, dict[str, Any]]
    edges: list[dict[str, Any]]

    def ends(self, kind: str | None = None) -> list[tuple[str, str]]:
        """The edges as pairs of names, those of one class if it is given."""
        return sorted(
            (edge["tail"], edge["head"]) for edge in self.edges if kind in (None, edge.get("class"))
        )

    def one(self, kind: str) -> dict[str, Any]:
        """The only edge of a class."""
        (edge,) = [edge for edge in self.edges if edge.get("class") == kind]
        return edge

    def rows(self) -> list[list[str]]:
        """The nodes that are set beside each other, row by row."""
        names = {node["_gvid"]: name for name, node in self.nodes.items()}
        return [
            [names[node] for node in subgraph["nodes"]]
            for subgraph in self.subgraphs.values()
            if subgraph.get("rank") == "same"
        ]


def need_graphviz() -> None:
    """Skip the test where no Graphviz is installed."""
    if shutil.which("dot") is None and importlib.util.find_spec("pygraphviz") is None:
        pytest.skip("neither Graphviz's dot nor pygraphviz is installed")


def drawn(graph: Digraph, kind: str = "dot_json") -> DrawnNumber:
    """Read a graph by Graphviz; as "json" with the places of all things, else without."""
    need_graphviz()
    # `render` would pass over what dot refuses and try pygraphviz, which reads on behind an error.
    text = graph.pipe(format=kind) if shutil.which("dot") else render(graph, kind)
    read = json.loads(text)
    names = {item["_gvid"]: item["name"] for item in read["objects"]}
    edges = [
        {**edge, "tail": names[edge["tail"]], "head": names[edge["head"]]}
        for edge in read.get("edges", [])
    ]
    subgraphs = {item["name"]: item for item in read["objects"] if "nodes" in item}
    nodes = {item["name"]: item for item in read["objects"] if "nodes" not in item}
    return DrawnNumber(read, nodes, subgraphs, edges)
