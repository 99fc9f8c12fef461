"""Functions that check values of tensors. Pytest does not rewrite the assertions of this file."""

import contextlib

import torch

LIMIT = 1e9


def asserts(model, x):
    assert torch.isfinite(x).all(), f"not finite: {x}"
    return x


def raises(model, x):
    if torch.isnan(x).any():
        message = f"not a number: {x}"
        raise ValueError(message)
    return x


def raises_at_the_end(model, x):
    if (x < LIMIT).all():
        y = 2 * x
    else:
        raise ValueError("too large")
    return y


def negated_over_lines(model, x):
    assert (  # noqa: PT018
        not torch.isnan(x).any()
        # The largest value.
        and (x < LIMIT).all()
    ), "no"
    return x


def in_several_parts(model, x):
    if (model.training and not (x < LIMIT).all()) or torch.isinf(x).any() or not len(x):
        raise ValueError("too large")
    return x


def by_a_number(model, x):
    assert 2 * x.abs().max().item() + 1 >= -1 and not x.sum().item() > LIMIT  # noqa: PT018
    return x


def only_reports(model, x):
    if torch.isnan(x).any():
        print("not a number", x.shape)
    return x


def computes(model, x):
    if torch.isnan(x).any():
        x = torch.zeros_like(x)
    return x


def computes_behind_a_check(model, x):
    if torch.isnan(x).any():
        raise ValueError("not a number")
    elif (x > LIMIT).any():  # noqa: RET506
        x = x.clamp(max=LIMIT)
    return x


def goes_on_after_an_error(model, x):
    try:
        if torch.isnan(x).any():
            raise ValueError
    except ValueError:
        x = torch.zeros_like(x)
    return x


def goes_on_after_a_suppressed_error(model, x):
    with contextlib.suppress(ValueError):
        if torch.isnan(x).any():
            raise ValueError
        x = 2 * x
    return x


def chooses_beside_a_check(model, x):
    # fmt: off
    x = x if x.sum() > 0 else -x; assert torch.isfinite(x).all()  # noqa: E702
    # fmt: on
    return x


def goes_on_after_the_error_of_a_function(model, x):
    try:
        return raises(model, x)
    except ValueError:
        return torch.zeros_like(x)


def keeps_the_number(model, x):
    largest = x.abs().max().item()
    if largest > LIMIT:
        raise ValueError("too large")
    return x / largest


def chooses(model, x):
    return x if x.sum() > 0 else -x
