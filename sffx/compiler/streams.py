"""Cut sets of several values, where streams run side by side.

Between two dominators of the logits there may be two branches, a U-Net or an HRNet, which are one
step. This pass looks for steps that hold more than a third of the model and at least five layers,
or are a dense stack. It adds cut sets inside them:

1. A step is divided into *parts*, and a large part into parts of its own (`stream_parts`).
2. A cut set may lie after each part with a weight. Of the places before the next layer, this pass
   chooses the one where the fewest bytes cross, and the last of equal ones: behind an activation
   and before a deconvolution. A pool to a flat value starts the way to the classifier, so it comes
   behind the cut.
3. Where streams meet at the logits alone, each has a last layer of its own. All last layers are the
   classifier's, so they run behind all others.

A gate stays with the value that it gates, unless the value also leads to the logits beside it.

Streams may share their layers: a Siamese net runs them on each of its inputs, a spiking net on each
step in time. All uses of a layer belong to one block, so the model is cut across all streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations, pairwise
from typing import TYPE_CHECKING

import networkx as nx
from torch import Tensor

from sffx.compiler.crossing import Crossing, CutSet
from sffx.compiler.dataflow import SOURCE
from sffx.compiler.dense_stacks import is_dense_stack
from sffx.compiler.facts import facts
from sffx.compiler.layers import scopes
from sffx.compiler.stream_parts import LARGE, Part, Sizes, is_unit, parts_of_module

if TYPE_CHECKING:
    from sffx.compiler.analyse import Analysis
    from sffx.compiler.dataflow import Dataflow
    from sffx.compiler.steps import Step


def with_streams(analysis: Analysis) -> Analysis:
    """Return an analysis with the cut sets between streams on its spine; the same if none are."""
    places: list[list[CutSet]] = []  # for each part, the cut sets to choose one from
    sizes = Sizes(analysis)
    for step in analysis.steps:
        is_dense = sizes.share(step.nodes) > LARGE and _is_dense(analysis, step)
        if is_dense or sizes.is_too_large(step.nodes, step.scope):
            places += _places(analysis, step, sizes)
    if not places:
        return analysis
    # Each once and in order: places may have a cut set in common.
    candidates = dict.fromkeys(chain.from_iterable(places))
    # An analysis knows the refusals of the cut sets on its own spine alone. So all candidates are
    # put on one spine first, and the chosen ones on another.
    refused = _refused(analysis.with_cut_sets(tuple(candidates)))
    chosen: dict[CutSet, None] = {}
    for place in places:
        allowed = [cut_set for cut_set in place if cut_set not in refused]
        best = _smallest(analysis, allowed)
        if best is not None and _is_between_streams(analysis, best):
            chosen[best] = None
    return analysis.with_cut_sets(tuple(chosen))


def _is_dense(analysis: Analysis, step: Step) -> bool:
    """Return whether a step is a dense stack, which may be short, and no unit."""
    if step.scope and is_unit(analysis, step.nodes, step.scope):
        return False
    return is_dense_stack(analysis, step.nodes, step.node)


def _refused(analysis: Analysis) -> set[CutSet]:
    """Return the cut sets on the spine across which no cut may lie."""
    return {frozenset(step.values) for step in analysis.steps if step.refusal}


def _is_between_streams(analysis: Analysis, cut_set: CutSet) -> bool:
    """Return whether policies are to cut across a cut set, since streams run side by side there.

    A single value that dominates the logits is such a cut set only if streams from several inputs
    meet there. Those streams never parted, so their meeting is no join.
    """
    name, *others = cut_set
    if others or not analysis.flow.dominates(name):
        return True
    streams_meet = analysis.flow.paths.in_degree(name) > 1
    return streams_meet and not analysis.join(name)


def _smallest(analysis: Analysis, cut_sets: Sequence[CutSet]) -> CutSet | None:
    """Return the cut set across which the fewest bytes go, the last of equal ones."""

    def size(cut_set: CutSet) -> int:
        return sum(facts(analysis.nodes[name]).example.nbytes for name in cut_set)

    # Of equal ones, `min` returns the first.
    return min(reversed(cut_sets), key=size, default=None)


def _places(analysis: Analysis, step: Step, sizes: Sizes) -> list[list[CutSet]]:
    """Return for each part of a step the cut sets that may lie after it, in order."""
    flow = analysis.flow
    in_order = [name for name in step.nodes if flow.leads_to_logits(name)]
    later = _modules_behind(analysis, step)
    parts = parts_of_module(analysis, in_order, step.scope, sizes, later)
    if len(parts) < 2:
        return []
    if any(_is_used_again(analysis, part) for part in parts):
        return _places_across_uses(analysis, step, parts)
    early = _early(analysis, in_order)
    late = _of_classifier(analysis, in_order)
    before_classifier = [name for name in in_order if name not in late]
    # A node that runs earlier or later than it is written belongs to no part. So the other nodes
    # are divided anew.
    if early or late:
        body = [name for name in before_classifier if name not in early]
        parts = parts_of_module(analysis, body, step.scope, sizes, later)
    if not parts:
        return []
    names = _with_early(before_classifier, early)
    spans = _spans(analysis, step, sizes, names, parts)
    return _places_behind(analysis, step, sizes, names, spans)


def _spans(
    analysis: Analysis, step: Step, sizes: Sizes, names: Sequence[str], parts: Sequence[Part]
) -> list[tuple[int, int]]:
    """Return the indices of the first and the last node of each part, and of a stem before them."""
    position = {name: i for i, name in enumerate(names)}
    spans = []
    for part in parts:
        first, last = part.nodes[0], part.nodes[-1]
        spans.append((position[first], position[last]))
    start_of_parts, _ = spans[0]
    stem = [i for i in range(start_of_parts) if sizes.layers([names[i]])]
    if stem and not _has_weight_before(analysis, step):
        spans.insert(0, (stem[0], stem[-1]))
    return spans


def _places_behind(
    analysis: Analysis,
    step: Step,
    sizes: Sizes,
    names: Sequence[str],
    spans: Sequence[tuple[int, int]],
) -> list[list[CutSet]]:
    """Return for each part the cut sets that may lie after it, in order.

    If the nodes are conv, relu, pool, conv_1 and relu_1, and each convolution is a part, a cut set
    may lie after each of conv, relu and pool, and for the second part after conv_1 and relu_1.

    Args:
        analysis: of the model.
        step: that is divided.
        sizes: of the model.
        names: of the nodes of the step before the classifier, in order.
        spans: the indices of the first and the last node of each part.
    """
    starts = {start for start, _ in spans}
    ends = {end for _, end in spans}
    # Parts may overlap, where streams run side by side. Inside of one, no cut may lie.
    covered: set[int] = set()
    for start, end in spans:
        covered.update(range(start, end))
    places: list[list[CutSet]] = []
    # Whether a part has ended and neither the next one nor the classifier has begun.
    is_open = False
    crossing = Crossing(analysis, step)
    for i, name in enumerate(names):
        values = crossing.after(name)  # asked of each node in turn, since it keeps account
        is_layer = sizes.layers([name]) > 0
        if i in starts or is_layer or _starts_classifier(analysis, name):
            is_open = False
        if i in covered:
            continue
        if i in ends:
            is_open = True
            places.append([])
        if is_open and values is not None:
            places[-1].append(values)
    return [place for place in places if place]


def _is_used_again(analysis: Analysis, part: Part) -> bool:
    """Return whether a part calls one of its layers several times."""
    called = []
    for name in part.nodes:
        node = analysis.nodes[name]
        if node.op == "call_module" and analysis.is_weighted(node):
            called.append(node.target)
    return len(set(called)) < len(called)


def _places_across_uses(analysis: Analysis, step: Step, parts: list[Part]) -> list[list[CutSet]]:
    """Return for each part the cut sets between all its uses and all uses of the next part.

    There are none where a use of the part reads what the next part has computed, as in a recurrent
    net: each cut set would have a use of the next part before it.
    """
    flow = analysis.flow
    crossing = Crossing(analysis, step)
    places: list[list[CutSet]] = []
    inside: set[str] = set()
    for part, following in pairwise(_in_order_of_flow(flow, parts)):
        # Two cuts are possible: right behind the part, and right before the next one.
        inside = inside | flow.before(part.nodes)
        until_next = inside | flow.before(_read_by_first_uses(flow, following))
        place = []
        for nodes in (inside, until_next):
            if not nodes.isdisjoint(following.nodes):
                continue
            values = crossing.behind(nodes)
            if values is not None:
                place.append(values)
        if place:
            places.append(place)
    return places


def _in_order_of_flow(flow: Dataflow, parts: Sequence[Part]) -> Sequence[Part]:
    """Return the parts so that each comes behind the parts that lead to it.

    Parts come in the order of their first nodes in a step. The first use of the first of two
    recurrent cells may be a step by itself, so that the second cell is the first part of the next.
    Parts that lead to each other, as in a recurrent net, keep their order.
    """
    leads = nx.DiGraph()
    leads.add_nodes_from(range(len(parts)))
    before = [flow.before(part.nodes) for part in parts]
    for (i, first), (k, second) in combinations(enumerate(parts), 2):
        is_ahead = not before[k].isdisjoint(first.nodes)
        is_behind = not before[i].isdisjoint(second.nodes)
        if is_ahead and not is_behind:
            leads.add_edge(i, k)
        if is_behind and not is_ahead:
            leads.add_edge(k, i)
    if not nx.is_directed_acyclic_graph(leads):
        return parts
    return [parts[i] for i in nx.lexicographical_topological_sort(leads)]


def _read_by_first_uses(flow: Dataflow, part: Part) -> set[str]:
    """Return the values that a part reads, without those that are computed from the part's own."""
    read: set[str] = set()
    computed: set[str] = set()
    for name in part.nodes:
        read.update(flow.paths.predecessors(name))
        computed |= {name, *nx.descendants(flow.paths, name)}
    return read - computed - {SOURCE}


def _early(analysis: Analysis, names: Sequence[str]) -> dict[str, str]:
    """Return the nodes that can run early, each with the node that it is to run behind.

    Where an encoder and a decoder share their embedding, a cut inside the encoder would part its
    two uses. The use in the decoder reads nothing but inputs, so it can run right behind the other.

    Args:
        analysis: of the model.
        names: of nodes on paths, in order.
    """
    early: dict[str, str] = {}
    first_uses: dict[int, str] = {}
    for name in names:
        starts_stream = list(analysis.flow.paths.predecessors(name)) == [SOURCE]
        for parameter in analysis.parameters(analysis.nodes[name]).values():
            first_use = first_uses.setdefault(id(parameter), name)
            if first_use != name and starts_stream:
                early[name] = first_use
    return early


def _with_early(names: Sequence[str], early: Mapping[str, str]) -> list[str]:
    """Return names of nodes in order, those that can run early as early as they can."""
    order = []
    for name in names:
        if name not in early:
            order.append(name)
            order += [each for each, first_use in early.items() if first_use == name]
    return order


def _of_classifier(analysis: Analysis, names: Sequence[str]) -> list[str]:
    """Return the nodes of the classifier, where several streams end in a last layer of their own.

    A layer is a last one if no layer is on the way from it to the logits. The pools and the dropout
    before it are the classifier's as well. All of them can run behind the other layers.

    Args:
        analysis: of the model.
        names: of nodes on paths that lead to the logits, in order.
    """
    last_layers, ending = _ends_of_streams(analysis)
    if len(last_layers) < 2:
        return []
    found: dict[str, None] = {}
    for name in names:
        if name not in ending:
            continue
        is_last_layer = name in last_layers
        is_pool = _starts_classifier(analysis, name)
        is_dropout = analysis.is_dropout(analysis.nodes[name])
        is_behind_found = not found.keys().isdisjoint(analysis.flow.paths.predecessors(name))
        if is_last_layer or is_pool or is_dropout or is_behind_found:
            found[name] = None
    return list(found)


def _ends_of_streams(analysis: Analysis) -> tuple[set[str], set[str]]:
    """Return the last layers of all streams, and the nodes that lead to no other layers.

    In `conv ── relu ── pool ── fc ── softmax`, fc is the last layer. The nodes from relu on lead to
    no other one.
    """
    flow = analysis.flow
    last_layers: set[str] = set()
    behind_layers: set[str] = set()  # the nodes that no layer is behind, such as softmax
    ending: set[str] = set()
    for name in reversed(flow.nodes):
        if not flow.leads_to_logits(name):
            continue
        readers = flow.readers(name)
        is_layer = analysis.is_weighted(analysis.nodes[name])
        # A last layer is not put in `behind_layers`, so no layer before it is one as well.
        if readers <= behind_layers and is_layer:
            last_layers.add(name)
        elif readers <= behind_layers:
            behind_layers.add(name)
        if readers <= ending and (not is_layer or name in last_layers):
            ending.add(name)
    return last_layers, ending


def _modules_behind(analysis: Analysis, step: Step) -> set[str]:
    """Return the qualnames of the modules that hold layers behind a step."""
    modules: set[str] = set()
    for later in analysis.steps[analysis.step_of[step.node] + 1 :]:
        for name in later.nodes:
            if analysis.is_weighted(analysis.nodes[name]):
                modules.update(scopes(analysis.nodes[name]))
    return modules


def _has_weight_before(analysis: Analysis, step: Step) -> bool:
    """Return whether a step before this one has a weight, so that this one starts with no stem."""
    earlier = analysis.steps[: analysis.step_of[step.node]]
    return any(each.weighted for each in earlier)


def _starts_classifier(analysis: Analysis, name: str) -> bool:
    """Return whether a node makes a value flat that was not, or pools it to a given size."""
    node = analysis.nodes[name]
    if analysis.is_adaptive_pool(node):
        return True
    value = facts(node).example
    if not isinstance(value, Tensor) or value.ndim >= 3:
        return False
    sources = [facts(source).example for source in node.all_input_nodes]
    return any(isinstance(source, Tensor) and source.ndim >= 3 for source in sources)
