"""Muon beside AdamW: against a plain definition, against torch's own, and resumed."""

import copy
import math

import pytest
import torch

from modeling_snn_bert.muon import QUINTIC, MuonAdamW, multiplies_bfloat16_fast, orthogonalized

SHAPES = [(24, 24), (24, 24), (48, 24), (24, 48), (24, 24), (1, 24)]


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr("modeling_snn_bert.muon.multiplies_bfloat16_fast", lambda device: False)


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    # Columns of many sizes, and a dead one.
    matrices = [x * torch.linspace(0.01, 1, x.shape[1], dtype=dtype) for x in matrices]
    matrices[0][:, 3] = 0
    return [torch.nn.Parameter(x) for x in [*matrices, torch.randn(7, generator=generator, dtype=dtype)]]


def optimizer_of(params, **settings):
    *matrices, vector = params
    groups = [{"params": [vector], "lr": 3e-3}, {"params": matrices, "muon": True, "lr": 1e-2, "weight_decay": 0.1}]
    return MuonAdamW(groups, weight_decay=0.01, **settings)


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def by_definition(matrix, gradients, lr, weight_decay, momentum):
    """One matrix after a step for each of `gradients`."""
    a, b, c = QUINTIC
    buffer = torch.zeros_like(matrix)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        whole = matrix.square().mean().sqrt()
        sizes = torch.stack([max(column.square().mean().sqrt(), 0.05 * whole) for column in matrix.T])
        x = (momentum * buffer + (1 - momentum) * gradient) @ sizes.diag()
        x = x / x.norm()
        for _ in range(5):
            x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        step = math.sqrt(max(matrix.shape)) * x @ sizes.diag()
        matrix = matrix * (1 - lr * weight_decay) - lr * step
    return matrix


def test_singular_values_end_near_1():
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 24, 24), (2, 96, 24), (2, 24, 96)]:
        matrices = torch.randn(shape, generator=generator)
        found = orthogonalized(matrices).float()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.2 and values.max() < 1.3 and values.median() > 0.6
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        # What is left of it in the basis of the singular vectors is on the diagonal.
        inner = u.mT @ found @ v.mT
        assert (inner - inner.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 0.05
    assert orthogonalized(torch.zeros(2, 4, 5)).abs().max() == 0


def test_steps_are_those_of_the_definition(in_float32):
    params, before = parameters(), [x.detach().clone() for x in parameters()]
    optimizer, gradients = optimizer_of(params, momentum=0.9), []
    for step in range(4):
        give_gradients(params, step)
        gradients.append([x.grad.clone() for x in params])
        optimizer.step()
    for i in range(len(SHAPES)):
        expected = by_definition(before[i], [of_step[i] for of_step in gradients], 1e-2, 0.1, 0.9)
        torch.testing.assert_close(params[i].detach(), expected, rtol=1e-4, atol=1e-5)
        assert (expected - before[i]).abs().max() > 1e-2
    assert params[0][:, 3].abs().max() > 0
    # The vector is AdamW's.
    alone = torch.nn.Parameter(before[-1])
    adamw = torch.optim.AdamW([alone], lr=3e-3, weight_decay=0.01)
    for of_step in gradients:
        alone.grad = of_step[-1]
        adamw.step()
    torch.testing.assert_close(params[-1], alone, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_of_equal_columns_it_is_the_muon_of_torch():
    torch.manual_seed(0)
    signs = [torch.randn(shape).sign() for shape in ((24, 24), (48, 24), (24, 48))]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in signs] for _ in range(2))
    optimizer = MuonAdamW([{"params": ours, "muon": True, "lr": 1e-2}])
    # Its scale is 0.2 times the root of the longer side.
    muon = torch.optim.Muon(theirs, lr=5e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    optimizer.step()
    muon.step()
    for one, other in zip(ours, theirs, strict=True):
        # Torch's is in bfloat16 everywhere.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
        assert (one - other.sign()).abs().max() > 1e-2


def test_the_learning_rate_is_relative(in_float32):
    """Weights that are ten times as large take steps that are."""
    steps = []
    for scale in (1, 10):
        matrix = torch.nn.Parameter(scale * parameters()[2].detach())
        before = matrix.detach().clone()
        optimizer = MuonAdamW([{"params": [matrix], "muon": True, "lr": 0.1}])
        give_gradients([matrix], 0)
        optimizer.step()
        steps.append((matrix.detach() - before) / scale)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)
    sizes, moved = (x.square().mean(0).sqrt() for x in (parameters()[2].detach(), steps[0]))
    large = sizes > sizes.max() / 2
    torch.testing.assert_close(moved[large] / sizes[large], torch.full((int(large.sum()),), 0.1), rtol=0.4, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_that_was_cut_off_goes_on(fused):
    whole, parts = parameters(), parameters()
    optimizer = optimizer_of(whole, fused=fused)
    first = optimizer_of(parts, fused=fused)
    for step in range(2):
        for params, of in ((whole, optimizer), (parts, first)):
            give_gradients(params, step)
            of.step()
    second = optimizer_of(parts, fused=fused)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(2, 4):
        for params, of in ((whole, optimizer), (parts, second)):
            give_gradients(params, step)
            of.step()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cap", "is_fast"),
    [(None, True), ("ALL", True), ("avx512_core_bf16", True), ("AVX2", False), ("AVX512_CORE", False)],
)
def test_a_processor_that_is_capped_has_no_fast_bfloat16(monkeypatch, cap, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if cap is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert multiplies_bfloat16_fast(torch.device("cpu")) == is_fast
    assert multiplies_bfloat16_fast(torch.device("cuda"))


def test_a_schedule_moves_the_rates_of_both():
    params = parameters()
    optimizer = optimizer_of(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    give_gradients(params, 0)
    optimizer.step()
    schedule.step()
    for one, other in zip(params, parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_closure_and_matrices_alone():
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True}])

    def closure():
        optimizer.zero_grad()
        loss = matrix.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_without_gradients_nothing_moves():
    params = parameters()
    optimizer_of(params).step()
    for one, other in zip(params, parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1"):
        optimizer_of(parameters(), momentum=1)
    for parameter, shape in (
        (parameters()[-1], r"\[7\]"),
        (torch.nn.Parameter(torch.zeros(3, 4)), r"\[3, 4\] of zeros"),
    ):
        with pytest.raises(ValueError, match=f"Muon takes matrices that are not 0, got a parameter of shape {shape}"):
            MuonAdamW([{"params": [parameter], "muon": True}])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer_of(parameters(), lr=-1.0)
