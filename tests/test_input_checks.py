"""What the checks let pass, and when they look at values. What they refuse is in the tables of `test_bad_input`."""

import pytest
import torch

from modeling_snn_bert.input_checks import check_inputs, check_labels, check_sequence_labels, values_can_be_read

IDS = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (4,)], ids=str)
def test_positions_and_types_may_be_the_same_for_all_rows(make_config, dtype, shape):
    others = torch.ones(shape, dtype=dtype)
    assert check_inputs(make_config(), IDS.to(dtype), IDS != 0, others, others, None).equal(IDS)


def test_embeddings_may_hold_anything_in_the_padding(make_config):
    embeds, mask = torch.randn(2, 4, 32), IDS != 0
    embeds[~mask] = float("nan")
    assert check_inputs(make_config(), None, mask, None, None, embeds) is embeds
    with pytest.raises(ValueError, match="NaN or infinite"):
        check_inputs(make_config(), None, None, None, None, embeds)


def test_values_are_read_on_a_cpu_only_and_not_while_a_graph_is_written(make_config):
    assert values_can_be_read(IDS) and not values_can_be_read(IDS.to("meta"))
    too_high = IDS + 1000
    with pytest.raises(ValueError, match="must lie in"):
        check_inputs(make_config(), too_high, None, None, None, None)
    check_inputs(make_config(), too_high.to("meta"), None, None, None, None)
    compiled = torch.compile(lambda x: x + values_can_be_read(x), backend="eager")
    assert compiled(IDS).equal(IDS)


def test_labels_that_are_ignored_need_no_class():
    labels = torch.tensor([0, 2, -100])
    check_labels(labels, labels.shape, 3, ignore_index=-100)
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\)"):
        check_labels(labels, labels.shape, 3)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (torch.tensor([0, 2]), 3, None),
        (torch.tensor([[0], [2]]), 3, "single_label_classification"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 3, None),
        (torch.tensor([0.3, -2.0]), 1, "regression"),
        (torch.tensor([[0.3], [-2.0]]), 1, None),
        (torch.tensor([1, 2]), 1, None),
    ],
)
def test_labels_of_each_kind_of_problem(labels, num_labels, problem_type):
    logits = torch.zeros(2, num_labels)
    check_sequence_labels(labels, logits, problem_type)
    with pytest.raises((TypeError, ValueError), match="`labels`"):
        check_sequence_labels(labels[:1], logits, problem_type)
