from __future__ import annotations

import copy

import pytest
from torch import fx

from sffx.compiler.facts import (
    BlockFacts,
    Facts,
    block_facts,
    change_facts,
    facts,
    set_block_facts,
    set_facts,
)


@pytest.fixture
def node() -> fx.Node:
    return fx.Graph().placeholder("x")


def test_a_copy_of_a_node_keeps_the_facts_and_has_its_own_from_then_on(node):
    set_facts(node, Facts(example=3))
    twin = fx.Graph().node_copy(node)
    assert facts(twin) == facts(node)
    change_facts(twin, read_behind=True)
    assert facts(twin).read_behind
    assert not facts(node).read_behind


def test_a_copy_of_a_graph_keeps_the_facts(node):
    set_facts(node, Facts(example=3))
    (twin,) = copy.deepcopy(node.graph).nodes
    assert facts(twin) == Facts(example=3)


def test_a_node_of_a_block_has_an_empty_record_until_it_is_given_one(node):
    assert block_facts(node) == BlockFacts()
    set_block_facts(node, BlockFacts(origin="conv", writes=frozenset({7})))
    assert block_facts(node).origin == "conv"
    assert block_facts(node).memory is None
