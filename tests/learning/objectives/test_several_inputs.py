"""Objectives with a model of two inputs: the first is changed, the other goes along."""

import pytest
import torch

import sffx
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
