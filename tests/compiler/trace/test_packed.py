"""Packed sequences, as of an LSTM that is given lengths, are traced and cut around.

The oracle is the model itself: the net without norms computes what it computes, for sequences of
any lengths.
"""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.utils.rnn as rnn
from torch import Tensor, nn

import sffx
from sffx.errors import ExportError, TraceError

IDS = torch.arange(42).reshape(6, 7) * 11 % 49 + 1
LENGTHS = torch.tensor([3, 7, 5, 2, 6, 2])


class Classifier(nn.Module):
    """Reads words by a recurrent layer; a function of its own makes one row of each sample."""

    def __init__(self, read, kind=nn.LSTM, batch_first=True):
        super().__init__()
        self.read = read
        self.embed = nn.Embedding(50, 8)
        self.rnn = kind(8, 6, num_layers=2, batch_first=batch_first, bidirectional=True)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.hidden(self.read(self, ids, lengths.cpu())).relu())


def last(states) -> Tensor:
    states = states[0] if isinstance(states, tuple) else states
    return torch.cat([states[-2], states[-1]], 1)


def by_state(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths, True, enforce_sorted=False)
    return last(model.rnn(packed)[1])


def steps_first(model, ids, lengths):
    x = model.embed(ids).transpose(0, 1)
    return last(model.rnn(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[1])


def by_maximum(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths, True, enforce_sorted=False)
    padded, _ = rnn.pad_packed_sequence(model.rnn(packed)[0], True, total_length=ids.shape[1])
    return padded.amax(1)


def by_mean(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths, True, enforce_sorted=False)
    padded, counts = rnn.pad_packed_sequence(model.rnn(packed)[0], batch_first=True)
    return padded.sum(1) / counts[:, None]


def by_last_step(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths, True, enforce_sorted=False)
    padded, counts = rnn.pad_packed_sequence(model.rnn(packed)[0], batch_first=True)
    return padded[torch.arange(ids.size(0)), counts - 1]


def by_embedded_steps(model, ids, lengths):
    packed = rnn.pack_padded_sequence(ids, lengths, True, enforce_sorted=False)
    packed = packed._replace(data=model.embed(packed.data))
    return last(model.rnn(packed)[1])


def by_given_state(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths, True, enforce_sorted=False)
    zeros = torch.zeros(4, ids.shape[0], 6)
    return last(model.rnn(packed, (zeros, zeros))[1])


def sorted_by_hand(model, ids, lengths):
    lengths, order = lengths.sort(0, descending=True)
    packed = rnn.pack_padded_sequence(model.embed(ids[order]), lengths, True)
    return last(model.rnn(packed)[1])[order.argsort()]


def by_list(model, ids, lengths):
    packed = rnn.pack_padded_sequence(model.embed(ids), lengths.tolist(), True, False)
    return last(model.rnn(packed)[1])


def by_counted_list(model, ids, lengths):
    counts = (ids.cumsum(1) > 0).sum(1).minimum(lengths).int().tolist()
    assert isinstance(counts, list)
    assert type(counts) is list
    return by_state(model, ids, torch.as_tensor(counts))


def by_changed_list(model, ids, lengths):
    counts = torch.tensor(lengths.tolist())
    counts += 1
    return by_state(model, ids, counts.clamp(max=7)) + lengths[:, None] / 100


READS = {
    "state": (by_state, {}),
    "GRU": (by_state, {"kind": nn.GRU}),
    "RNN": (by_state, {"kind": nn.RNN}),
    "steps first": (steps_first, {"batch_first": False}),
    "maximum": (by_maximum, {}),
    "mean": (by_mean, {}),
    "last step": (by_last_step, {}),
    "embedded steps": (by_embedded_steps, {}),
    "given state": (by_given_state, {}),
    "sorted by hand": (sorted_by_hand, {}),
    "list": (by_list, {}),
    "counted list": (by_counted_list, {}),
    "changed list": (by_changed_list, {}),
}


def scores(net, ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the scores of each block, (K, B, J)."""
    return net.train()(ids, lengths)


@pytest.mark.parametrize("read", READS)
def test_sequences_of_other_lengths_are_read_as_by_the_model(read):
    torch.manual_seed(0)
    function, options = READS[read]
    model = Classifier(function, **options)
    net = sffx.transform(model, "layer", (IDS[:2], LENGTHS[:2]), norm="none", check=False)
    assert not net.plan.leaves
    assert len(net.plan) >= 2
    found = scores(net, IDS, LENGTHS)
    assert torch.equal(found[-1], model(IDS, LENGTHS))
    # Each block scores each sample for itself, in the order of the inputs.
    order = torch.tensor([2, 0, 5, 1, 4, 3])
    of_others = scores(net, IDS[order], LENGTHS[order])
    assert torch.allclose(of_others, found[:, order], atol=1e-6)


def test_such_a_net_is_checked_with_lengths_that_differ():
    model = Classifier(by_state)
    net = sffx.transform(model, example_input=(IDS, LENGTHS))
    lengths = net.plan.inputs[1]
    assert (lengths.low, lengths.high) == (1, 8)
    assert not sffx.check(model, net).skipped


def test_such_a_net_is_trained_counted_and_saved():
    net = sffx.transform(Classifier(by_maximum), example_input=(IDS, LENGTHS))
    sffx.local_loss(net, (IDS, LENGTHS), torch.zeros(6, dtype=torch.int64)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    small, large = (sffx.footprint(net, batch_size).peak for batch_size in (4, 64))
    assert small < large
    file = io.BytesIO()
    torch.save(net.eval(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(IDS, LENGTHS), net(IDS, LENGTHS))


def test_sorted_lengths_are_required_as_by_the_model():
    def read(model, ids, lengths):
        return last(model.rnn(rnn.pack_padded_sequence(model.embed(ids), lengths, True))[1])

    model = Classifier(read)
    net = sffx.transform(model, "layer", (IDS, LENGTHS), norm="none")
    ordered = LENGTHS.sort(descending=True).values
    assert torch.equal(scores(net, IDS, ordered)[-1], model(IDS, ordered))
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):
        net(IDS, LENGTHS)


def test_an_export_names_what_has_no_form_in_a_file(tmp_path):
    net = sffx.transform(Classifier(by_state), example_input=(IDS, LENGTHS), check=False)
    with pytest.raises(ExportError, match=r"pack_padded_sequence has no form .* Hint: .*extract"):
        sffx.export_program(net, tmp_path / "net.pt2")


def ending(model, ids, lengths):
    numbers = lengths.tolist()
    return model.rnn(model.embed(ids)[:, : max(numbers)])[0].mean(1)


def repeated(model, ids, lengths):
    return by_state(model, ids, torch.tensor(lengths.tolist() * 1))


def number_by_number(model, ids, lengths):
    return by_state(model, ids, torch.tensor([int(each) for each in lengths.tolist()]))


def split_by_numbers(model, ids, lengths):
    return torch.stack([each.mean(0) for each in model.embed(ids).split(lengths.tolist())])


def as_sizes(model, ids, lengths):
    return by_state(model, ids, lengths) + torch.zeros(lengths.tolist()).sum()


@pytest.mark.parametrize("read", [ending, repeated, number_by_number, split_by_numbers, as_sizes])
def test_lengths_as_plain_numbers_are_refused(read):
    with pytest.raises(TraceError, match=r"a number is read from a tensor.*Hint: "):
        sffx.plan(Classifier(read), example_input=(IDS, LENGTHS))


def test_such_a_net_is_compiled():
    net = sffx.transform(Classifier(by_mean), example_input=(IDS, LENGTHS), check=False).eval()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(IDS, LENGTHS), net(IDS, LENGTHS), atol=1e-6)
