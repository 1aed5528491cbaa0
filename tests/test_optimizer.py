"""The optimizer's arithmetic beside float64, and beside PyTorch's own steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bandit_rft.optimizer import PolicyOptimizer


def test_the_norm_of_a_large_gradient_is_that_of_float64() -> None:
    """PyTorch's own norm on a CPU adds up squares in float32: it was 0.07% too small here."""
    parameter = nn.Parameter(torch.empty(1 << 24))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0, max_grad_norm=0.0)
    gradient = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    assert parameter.grad is not None
    parameter.grad.copy_(gradient)
    norm = optimizer.step()
    assert float(norm) == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def test_steps_are_those_of_clipped_adamw_for_parameters_of_any_layout() -> None:
    """Gradients of transposed, strided, tiny and float64 parameters lie as the parameters do."""
    torch.manual_seed(0)

    def made() -> list[nn.Parameter]:
        torch.manual_seed(1)
        return [
            nn.Parameter(torch.randn(40, 30).t()), nn.Parameter(torch.randn(7, 5)[:, ::2]),
            nn.Parameter(torch.randn(2, 3, 4).permute(2, 0, 1)), nn.Parameter(torch.randn(())),
            nn.Parameter(torch.randn(300, 400)), nn.Parameter(torch.randn(9, dtype=torch.float64)),
        ]  # fmt: skip

    ours, theirs = made(), made()
    optimizer = PolicyOptimizer([(str(i), p) for i, p in enumerate(ours)], learning_rate=0.1, max_grad_norm=0.5)
    plain = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
    for _ in range(3):
        loss_of_ours, loss_of_theirs = (sum((p * p.detach().cos()).sum() for p in side) for side in (ours, theirs))
        loss_of_ours.backward()  # type: ignore[union-attr]
        loss_of_theirs.backward()  # type: ignore[union-attr]
        norm = optimizer.step()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 0.5)))
        plain.step()
        plain.zero_grad()
        assert not any(p.grad is not None and p.grad.any() for p in ours)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"parameter {i}: {text}")


@pytest.mark.parametrize("sizes", [(0,), (0, 5), (1 << 16,), (70_000, 3), (200_000, 16, 0)])
def test_gradients_side_by_side_take_their_own_memory(sizes: tuple[int, ...]) -> None:
    """What lies in `gradients` is what ranks send each other; each gradient begins where a vector may."""
    parameters = [nn.Parameter(torch.empty(size)) for size in sizes]
    optimizer = PolicyOptimizer([(str(i), p) for i, p in enumerate(parameters)], learning_rate=0.0)
    (gradients,) = optimizer.gradients
    assert sum(sizes) <= len(gradients) < sum(sizes) + 16 * len(sizes)
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.storage_offset() % 16 == 0
        parameter.grad.fill_(3.0)
    assert float(optimizer.step()) == pytest.approx(3 * sum(sizes) ** 0.5)


@pytest.mark.parametrize("way", ["zero_grad", "another gradient", "another optimizer"])
def test_a_gradient_that_somebody_replaced_is_stepped_on_clipped_and_cleared(way: str) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0, max_grad_norm=1.0)
    parameter.sum().backward()  # which is forgotten
    parameter.grad = None
    if way == "another optimizer":
        PolicyOptimizer([("w", parameter)], learning_rate=0.0)
    if way == "another gradient":
        parameter.grad = torch.full((3,), 100.0)
    else:
        (100 * parameter).sum().backward()
    assert float(optimizer.step()) == pytest.approx(100 * 3**0.5)
    parameter.sum().backward()
    assert float(optimizer.step()) == pytest.approx(3**0.5)
    parameter.grad = None
    assert float(optimizer.step()) == 0.0


def test_a_gradient_buffer_is_there_after_zero_grad() -> None:
    """The head adds its weight's gradient into it; what autograd has put in its place stays in the sum."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0)
    parameter.grad = None
    optimizer.grad_buffer(parameter).add_(1.0)
    (2 * parameter).sum().backward()
    parameter.grad = torch.full((3,), 4.0)
    optimizer.grad_buffer(parameter).add_(1.0)
    assert float(optimizer.step()) == pytest.approx(5 * 3**0.5)


def test_a_transposed_parameter_goes_on_where_it_was() -> None:
    gradient = torch.randn(3, 4)

    def steps(parameter: nn.Parameter, state: dict[str, torch.Tensor] | None, count: int) -> dict[str, torch.Tensor]:
        optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
        if state is not None:
            optimizer.load_state_tensors({name: tensor.contiguous() for name, tensor in state.items()})
        for _ in range(count):
            (parameter * gradient * parameter.detach().cos()).sum().backward()
            optimizer.step()
        return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}

    start = torch.randn(4, 3)
    whole, halves = nn.Parameter(start.clone().t()), nn.Parameter(start.clone().t())
    steps(whole, None, 4)
    steps(halves, steps(halves, None, 2), 2)
    assert torch.equal(whole, halves)


def test_gradients_of_a_refused_step_are_not_part_of_the_next() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0)
    (parameter * torch.nan).sum().backward()
    with pytest.raises(FloatingPointError, match="norm is nan"):
        optimizer.step()
    parameter.sum().backward()
    assert float(optimizer.step()) == pytest.approx(3**0.5)


def test_gradients_in_anothers_place_are_cleared_too() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0)
    parameter.grad = None
    (parameter * torch.nan).sum().backward()
    optimizer.clear()
    parameter.sum().backward()
    assert float(optimizer.step()) == pytest.approx(3**0.5)


def test_strides_of_one_entry_say_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(5, 1))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.0)
    parameter.data = torch.ones(1, 5).T
    parameter.sum().backward()
    assert float(optimizer.step()) == pytest.approx(5**0.5)


def test_no_graph_grows_behind_the_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
    (parameter**2).sum().backward(create_graph=True)
    optimizer.step()
    assert parameter.grad is None or not parameter.grad.requires_grad


@pytest.mark.parametrize("way", ["a newer optimizer", "closed"])
def test_an_optimizer_that_gets_no_gradients_any_more_refuses_to_step(way: str) -> None:
    """It would write its own, older, masters over what has been trained since."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
    if way == "closed":
        optimizer.close()
    else:
        newer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
        parameter.sum().backward()
        newer.step()
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="a newer optimizer, or this one is closed"):
        optimizer.step()
    assert torch.equal(parameter.detach(), before)


def test_a_parameter_that_lies_otherwise_now_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
    parameter.data = torch.ones(4, 3).t()
    with pytest.raises(RuntimeError, match=r"w has the strides \(1, 3\) now, \(4, 1\) when it was taken up"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w|master": torch.ones(1, 3)}, r"optimizer state w: \[1, 3\] does not fit \[4, 3\]"),
        ({"w|exp_avg": torch.ones(3)}, r"optimizer state w: \[3\] does not fit \[4, 3\]"),
        ({"w|exp_avg_sq": None}, r"optimizer state w: expected \['exp_avg', 'exp_avg_sq', 'step'\]; got"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, torch.Tensor | None], message: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
    parameter.sum().backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    state = {name: tensor for name, tensor in {**before, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_tensors({name: 2 * tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())


def test_the_state_of_an_optimizer_without_a_step_is_taken_up_too() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=0.1)
    parameter.sum().backward()
    optimizer.step()
    optimizer.load_state_tensors({})
    assert optimizer.state_tensors() == {}
