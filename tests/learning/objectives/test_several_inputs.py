"""Objectives with a model of two inputs: the first is changed, the other goes along."""

import pytest
import torch
from torch import nn

import sffx
from sffx import InputError
from sffx.objectives import ForwardForward
from tests.toys import TwoInputs

IMAGE, TEXT = torch.rand(6, 6), torch.rand(6, 5)
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def cut(objective):
    torch.manual_seed(0)
    example = (torch.zeros(1, 6), torch.zeros(1, 5))
    return sffx.transform(TwoInputs(), "layer", example, objective=objective).train()


@pytest.mark.parametrize("objective", ["ff", "cffa", "scff"])
def test_each_sample_keeps_its_other_input(objective):
    net = cut(objective)
    sffx.local_loss(net, (IMAGE, TEXT), Y).backward()
    assert all(p.grad is not None for p in net.block_0.parameters())
    net.eval()
    with torch.no_grad():
        scores = net(IMAGE, TEXT)
        one_by_one = [net(IMAGE[n : n + 1], TEXT[n : n + 1]) for n in range(6)]
        torch.testing.assert_close(scores, torch.cat(one_by_one))
        torch.testing.assert_close(sffx.block_scores(net, (IMAGE, TEXT)), _scores(net))
    features = sffx.LinearProbe(net).features((IMAGE, TEXT))
    assert not torch.allclose(features, sffx.LinearProbe(net).features((IMAGE, TEXT.flip(0))))


def _scores(net):
    rows = [sffx.block_scores(net, (IMAGE[n : n + 1], TEXT[n : n + 1])) for n in range(6)]
    return torch.cat(rows, dim=1)


class Frames(nn.Module):
    """Tokens that are floats, such as frames of sound, with a mask."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x, attention_mask):
        h = self.second(self.first(x).relu()).relu()
        real = attention_mask[:, :, None].to(h.dtype)
        return self.last((h * real).sum(1) / real.sum(1))


MASK = (torch.arange(7) < torch.tensor([[1], [3], [7], [5], [2], [7]])).long()
# The others make one sample of two.
MASKED = ["sff", "cwc", "ff", "cffa", "ffcl", ForwardForward(peer=0.1)]


@pytest.mark.parametrize("objective", MASKED)
def test_padding_changes_nothing(objective):
    torch.manual_seed(0)
    example = (torch.zeros(2, 7, 5), torch.ones(2, 7, dtype=torch.long))
    net = sffx.transform(Frames(), "layer", example, objective=objective).train()
    assert all(block.mask for block in net.plan)
    frames = torch.rand(6, 7, 5)
    other = frames.masked_fill(MASK[:, :, None] == 0, 50.0)
    losses, scores, features = [], [], []
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for x in (frames, other):
        net.load_state_dict(before)
        torch.manual_seed(1)
        losses.append(sffx.local_loss(net.train(), (x, MASK), Y).detach())
        scores.append(net.eval()(x, MASK))
        features.append(sffx.LinearProbe(net).features((x, MASK)))
    for one, two in (losses, scores, features):
        torch.testing.assert_close(one, two)


def test_pairs_of_samples_with_other_padding_are_refused():
    example = (torch.zeros(2, 7, 5), torch.ones(2, 7, dtype=torch.long))
    with pytest.raises(InputError, match=r"padding each, as 'attention_mask' says\. Hint: "):
        sffx.transform(Frames(), "layer", example, objective="scff")


@pytest.mark.parametrize("objective", ["ff", "cffa"])
def test_labels_in_the_padding_are_refused(objective):
    """The label is the first four values, which are in the first token."""
    example = (torch.zeros(2, 7, 5), torch.ones(2, 7, dtype=torch.long))
    net = sffx.transform(Frames(), "layer", example, objective=objective).train()
    frames = torch.rand(6, 7, 5)
    sffx.local_loss(net, (frames, MASK), Y)
    with pytest.raises(InputError, match=r"first 1 tokens, which are padding in 4 samples. Hint"):
        sffx.local_loss(net, (frames, MASK.flip(1)), Y)
