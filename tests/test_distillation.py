"""Distillation losses and parameter groups."""

import itertools

import pytest
import torch
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from modeling_snn_bert import SNNBertConfig, SNNBertModel
from modeling_snn_bert.distillation import (
    attention_loss,
    check_same_shape,
    embedding_loss,
    hidden_state_loss,
    label_and_logit_loss,
    logit_loss,
    parameter_groups,
    relation_loss,
)
from modeling_snn_bert.modeling_snn_bert import SNNBertSequenceClassifierOutput


def states(layers=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 5, 8, generator=generator) for _ in range(layers + 1)]


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_check_same_shape(name):
    teacher = BertConfig(vocab_size=48, hidden_size=48, num_hidden_layers=2)
    settings = {"vocab_size": 48, "hidden_size": 48, "num_hidden_layers": 2}
    check_same_shape(SNNBertConfig(**settings), teacher)
    with pytest.raises(ValueError, match=f"the student must have the {name} of its teacher, {settings[name]}; .* 24"):
        check_same_shape(SNNBertConfig(**{**settings, name: 24}), teacher)


def test_hidden_state_loss_is_in_units_of_the_teacher():
    teacher = states()
    assert hidden_state_loss(teacher, teacher) == 0
    means = [x.mean((0, 1), keepdim=True).expand_as(x) for x in teacher]
    torch.testing.assert_close(hidden_state_loss(means, teacher), torch.tensor(1.0))
    torch.testing.assert_close(
        hidden_state_loss([10 * x for x in states(seed=1)], [10 * x for x in teacher]),
        hidden_state_loss(states(seed=1), teacher),
    )


def test_padding_and_embeddings_do_not_count():
    student, teacher = states(seed=1), states()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    wanted = hidden_state_loss(student, teacher, mask)
    changed = [torch.where(mask[..., None] == 1, x, 99.0) for x in student]
    changed[0] = changed[0] + 5
    assert hidden_state_loss(changed, teacher, mask) == wanted > 0


def test_repeat_coding_is_averaged():
    student, teacher = states(batch=6, seed=1), states(batch=2)
    averaged = [x.unflatten(0, (3, 2)).mean(0) for x in student]
    torch.testing.assert_close(hidden_state_loss(student, teacher), hidden_state_loss(averaged, teacher))


def test_logit_loss():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    assert logit_loss(teacher, teacher) == 0
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(logit_loss(student, teacher), 4 * (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(logit_loss(student[:, :1], teacher[:, :1]), (student - teacher)[:, 0].square().mean())


def test_labels_and_logits_share_the_loss_and_the_penalty_stays_whole():
    logits, wanted, penalty = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(0.7)
    outputs = SNNBertSequenceClassifierOutput(loss=2.0 + 5 * penalty, logits=logits, firing_rate_penalty=penalty)
    for weight in (0.0, 0.3, 1.0):
        expected = (1 - weight) * 2.0 + weight * logit_loss(logits, wanted, 3.0) + 5 * penalty
        loss = label_and_logit_loss(outputs, wanted, weight, firing_rate_weight=5.0, temperature=3.0)
        torch.testing.assert_close(loss, expected)
    plain = SequenceClassifierOutput(loss=torch.tensor(2.0), logits=logits)
    torch.testing.assert_close(label_and_logit_loss(plain, wanted, 0.0), torch.tensor(2.0))
    for bad, weight, message in (
        (SequenceClassifierOutput(logits=logits), 0.5, "labels"),
        (plain, 1.5, "logit_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            label_and_logit_loss(bad, wanted, weight)


def test_every_parameter_is_in_one_group():
    config = SNNBertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = SNNBertModel(config)
    weights, others, neurons = parameter_groups(model, 1e-4, weight_decay=0.01)
    grouped = [p for group in (weights, others, neurons) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len({*map(id, grouped)})
    assert (weights["weight_decay"], others["weight_decay"], neurons["weight_decay"]) == (0.01, 0, 0)
    assert neurons["lr"] == pytest.approx(1e-3)
    ends = ("v_threshold", "_logit", "reset_strength", "query_gain", "query_offset")
    wanted = {id(p) for name, p in model.named_parameters() if name.endswith(ends)}
    assert {id(p) for p in neurons["params"]} == wanted
    *rest, matrices = parameter_groups(model, 1e-4, weight_decay=0.01, muon_learning_rate=1e-2)
    found = {id(p) for p in matrices["params"]}
    linears = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert found == {id(linear.weight) for linear in linears} and len(linears) == 6
    assert (matrices["muon"], matrices["lr"], matrices["weight_decay"]) == (True, 1e-2, 0.01)
    left = [p for group in rest for p in group["params"]]
    assert {id(p) for p in left} == {id(p) for p in model.parameters()} - found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: hidden_state_loss(states(2), states(3)), "as many hidden states", id="layers"),
        pytest.param(lambda: hidden_state_loss(states(batch=3), states(batch=2)), "agree in shape", id="shapes"),
        pytest.param(lambda: logit_loss(torch.ones(2, 3), torch.ones(2, 2)), "agree in shape", id="logits"),
        pytest.param(
            lambda: embedding_loss(torch.ones(2, 3, 8), torch.ones(2, 3, 4), torch.ones(2, 3)),
            "states must agree in shape",
            id="embeddings",
        ),
        pytest.param(lambda: logit_loss(torch.ones(2, 3), torch.ones(2, 3), 0), "temperature", id="temperature"),
        pytest.param(lambda: parameter_groups(torch.nn.Linear(2, 2), 0.0), "learning rates", id="learning-rate"),
        pytest.param(
            lambda: parameter_groups(torch.nn.Linear(2, 2), 1e-3, muon_learning_rate=0.0), "learning rates", id="muon"
        ),
        pytest.param(
            lambda: parameter_groups(torch.nn.Linear(2, 2), 1e-3, muon_learning_rate=1e-2),
            "weights that take spikes; Linear trains none",
            id="no-spikes",
        ),
        pytest.param(
            lambda: parameter_groups(torch.nn.Linear(2, 2), 1e-3, weight_decay=-1), "weight_decay", id="decay"
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def attentions(layers=2, batch=2, seed=0):
    return [x.softmax(-1) for x in torch.randn(layers, batch, 3, 5, 5, generator=torch.Generator().manual_seed(seed))]


def test_attention_loss_is_the_divergence_of_the_rows():
    teacher, student = attentions(), attentions(seed=1)
    assert attention_loss(teacher, teacher).abs() < 1e-6
    wanted = sum((t * (t.log() - s.log())).sum(-1).mean() for s, t in zip(student, teacher, strict=True)) / 2
    torch.testing.assert_close(attention_loss(student, teacher), wanted)
    repeated = [torch.cat([x, x]) for x in student]
    torch.testing.assert_close(attention_loss(repeated, teacher), wanted)


def test_attention_loss_leaves_padding_out():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    teacher, student = attentions(), attentions(seed=1)
    for weights in (*teacher, *student):
        # Nobody looks at padding; what padding looks at is noise.
        weights[0, :, :, 3:] = 0
        weights[0] /= weights[0].sum(-1, keepdim=True)
    wanted = attention_loss(student, teacher, mask)
    for weights in student:
        weights[0, :, 3:] = 0.2
    assert attention_loss(student, teacher, mask) == wanted and wanted.isfinite() and wanted > 0


def test_relation_loss_is_the_error_of_the_cosines():
    """By its definition, two tokens and a part at a time, of states that differ in width."""
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    centred = [x - x.mean((0, 1)) for x in (student, teacher)]
    mine, theirs = (
        torch.stack(
            [
                torch.cosine_similarity(*x[row, [one, other]].unflatten(1, (4, -1))[:, part], dim=0)
                for row in range(2)
                for part in range(4)
                for one, other in itertools.combinations(range(5), 2)
            ]
        )
        for x in centred
    )
    wanted = (mine - theirs).square().mean() / theirs.var(correction=0)
    torch.testing.assert_close(relation_loss(student, teacher, relation_heads=4), wanted)
    assert relation_loss(3 * teacher + 1, teacher, relation_heads=4).abs() < 1e-6
    repeated = torch.cat([student - 0.25, student + 0.25])
    torch.testing.assert_close(relation_loss(repeated, teacher, relation_heads=4), wanted)


def test_relation_loss_leaves_padding_out():
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = relation_loss(student, teacher, mask, relation_heads=4)
    with torch.no_grad():
        student[0, 3:], teacher[0, 3:] = 100.0, -7.0
    assert relation_loss(student, teacher, mask, relation_heads=4) == loss and loss > 0.1
    loss.backward()
    assert student.grad.isfinite().all() and not student.grad[0, 3:].any() and student.grad[0, :3].all()
    # Rows of one token have no relations.
    alone = relation_loss(student[:, :1], teacher[:, :1], relation_heads=4)
    alone.backward()
    assert alone == 0 and student.grad.isfinite().all()


def test_relation_loss_refuses():
    with pytest.raises(ValueError, match="must be of the same tokens"):
        relation_loss(torch.randn(2, 5, 12), torch.randn(2, 6, 12), relation_heads=4)
    with pytest.raises(ValueError, match="`relation_heads` must divide the width of the states, 8, got 3"):
        relation_loss(torch.randn(2, 5, 8), torch.randn(2, 5, 12), relation_heads=3)


@pytest.mark.parametrize(
    "student", [None, (), attentions(layers=1), attentions(batch=3)], ids=["none", "empty", "layers", "shape"]
)
def test_attention_loss_refuses(student):
    with pytest.raises(ValueError, match="attention"):
        attention_loss(student, attentions())


def test_embedding_loss_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(7) < torch.tensor([3, 1, 7, 5])[:, None]).long()
    hidden, wanted = (
        torch.where(mask[..., None] != 0, torch.randn(4, 7, 6, generator=generator), padding) for padding in (1e3, -1e3)
    )
    means, targets = (
        torch.stack([row[valid != 0].mean(0) for row, valid in zip(x, mask, strict=True)]) for x in (hidden, wanted)
    )
    variance = sum(((row - targets.mean(0)) ** 2).mean() for row in targets) / len(targets)
    error = sum(((one - two) ** 2).mean() for one, two in zip(means, targets, strict=True)) / len(targets)
    torch.testing.assert_close(embedding_loss(hidden, wanted, mask), error / variance)
    assert embedding_loss(wanted, wanted, mask) == 0
