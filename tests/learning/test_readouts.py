"""Each readout against its definition, and the module that a cut model ends with."""

import pytest
import torch
from torch import fx

from sffx.errors import InputError
from sffx.learning.readouts import MODES, READOUTS, Readout, every_mode

WEIGHTS = (0.25, 0.0, 0.75)


def scores() -> list[torch.Tensor]:
    """The goodness of three blocks and the logits, (2, 4) each."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(4, 2, 4, generator=generator, dtype=torch.float64))


def by_hand(name: str) -> torch.Tensor:
    first, second, third, logits = scores()
    return {
        "ensemble": (first + second + third) / 3,
        "weighted": (0.25 * first.softmax(1) + 0.75 * third.softmax(1)).log(),
        "last": third,
        "classifier": logits,
        "cumulative": torch.stack([first, (first + second) / 2, (first + second + third) / 3]),
    }[name]


def stacked(value: object) -> torch.Tensor:
    return torch.stack(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", READOUTS)
def test_each_readout_is_its_definition(name):
    torch.testing.assert_close(stacked(READOUTS[name](scores(), WEIGHTS)), by_hand(name))


@pytest.mark.parametrize("name", READOUTS)
def test_a_stacked_tensor_gives_the_same_bits_as_a_list(name):
    listed = stacked(READOUTS[name](scores(), WEIGHTS))
    assert torch.equal(stacked(READOUTS[name](torch.stack(scores()), WEIGHTS)), listed)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("ensemble", [0, 1, 2]),
        ("weighted", [0, 2]),
        ("last", [2]),
        ("classifier", [3]),
        ("cumulative", [0, 1, 2]),
    ],
)
def test_a_traced_readout_reads_only_what_it_needs(name, read):
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = [graph.placeholder(f"x{i}") for i in range(4)]
    answer = READOUTS[name]([fx.Proxy(node, tracer) for node in inputs], WEIGHTS)
    graph.output(fx.node.map_aggregate(answer, lambda proxy: proxy.node))
    graph.eliminate_dead_code()
    assert [i for i, node in enumerate(inputs) if node.users] == read
    traced = fx.GraphModule({}, graph)
    assert torch.equal(stacked(traced(*scores())), stacked(READOUTS[name](scores(), WEIGHTS)))


def test_a_block_without_weight_may_say_anything():
    values = scores()
    values[1] = torch.full_like(values[1], torch.nan)
    torch.testing.assert_close(READOUTS["weighted"](values, WEIGHTS), by_hand("weighted"))


def test_every_mode_leaves_out_the_mixture_where_there_are_no_weights():
    assert list(every_mode(scores(), WEIGHTS)) == list(MODES)
    assert list(every_mode(scores())) == [name for name in MODES if name != "weighted"]
    for name, value in every_mode(scores(), WEIGHTS).items():
        torch.testing.assert_close(value, by_hand(name))


@pytest.mark.parametrize("name", MODES)
def test_the_module_returns_the_readout_of_its_mode_in_eval_mode(name):
    readout = Readout()
    readout.weights = WEIGHTS
    readout.mode = name
    assert torch.equal(readout(scores()), torch.stack(scores()))
    torch.testing.assert_close(readout.eval()(scores()), by_hand(name))


def test_modes_that_cannot_be():
    readout = Readout()
    with pytest.raises(InputError, match=r"no readout 'cumulative'\. Hint: the readouts are 'ens"):
        readout.mode = "cumulative"
    with pytest.raises(InputError, match=r"the blocks have no weights yet\. Hint: sffx\.weigh"):
        readout.mode = "weighted"
    readout.weights = (0.5, 0.5)
    readout.mode = "weighted"
    with pytest.raises(InputError, match="there are 2 weights, but 3 blocks"):
        readout.eval()(scores())
    assert readout.mode == "weighted"


def test_weights_travel_in_the_state_dict_with_their_mode():
    weighed, other = Readout(), Readout()
    weighed.weights = WEIGHTS
    other.load_state_dict(weighed.state_dict())
    assert other.weights == WEIGHTS
    assert other.mode == "weighted"
    other.load_state_dict(Readout().state_dict())
    assert other.weights is None
    assert other.mode == "ensemble"


def test_weights_come_back_to_the_bit():
    """Their sum is 1 but for rounding, and a division by it would move them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        given = torch.rand(3, generator=generator, dtype=torch.float64)
        weighed, other = Readout(), Readout()
        weighed.weights = tuple((given / given.sum()).tolist())
        other.load_state_dict(weighed.state_dict())
        assert other.weights == weighed.weights
    other.load_state_dict({"weights": torch.tensor([1.0, 1.0, 2.0])})
    assert other.weights == (0.25, 0.25, 0.5)
