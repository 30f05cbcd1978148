"""The suite that transformers runs on every model of its own, on all SNN-BERT models.

What is skipped here must be skipped, for the same reason, for transformers' own BERT: see `same_skips_as`.
"""

import contextlib
import functools
import re
import unittest

import torch
import transformers
import transformers_suite
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import modeling_snn_bert
from modeling_snn_bert import SNNBertConfig

try:
    suite, ConfigTester = transformers_suite.load()
    ModelTesterMixin = suite.ModelTesterMixin
    FETCH_ERROR = None
except Exception as error:
    # Raised by every test below; an error while pytest collects would keep all other files from running.
    suite, ConfigTester, FETCH_ERROR = None, None, error

    class ModelTesterMixin:
        pass


HEADS = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "ForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}
# The suite learns from the names in these tables which labels a model takes.
for head, table in HEADS.items():
    getattr(modeling_auto, table)["snn_bert"] = f"SNNBert{head}"


class ModelTester:
    """A small model and a batch for it; the same sizes for SNN-BERT and for BERT."""

    is_training = True
    batch_size = 13
    seq_length = 7
    num_choices = 4
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    type_sequence_label_size = 2

    def __init__(self, parent, config_class, **settings):
        self.parent = parent
        self.config_class = config_class
        self.settings = settings

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            max_position_embeddings=512,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            type_vocab_size=16,
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": torch.randint(self.vocab_size, shape, device=torch_device),
            "token_type_ids": torch.randint(16, shape, device=torch_device),
            "attention_mask": torch.ones(shape, dtype=torch.long, device=torch_device).tril(),
        }
        return self.get_config(), inputs


class SkipRecorder(unittest.TestCase):
    """Notes the reasons for which subtests were skipped; unittest itself only tells its result object."""

    def setUp(self):
        if FETCH_ERROR is not None:
            raise FETCH_ERROR
        transformers.set_seed(0)
        self.reasons = []

    @contextlib.contextmanager
    def subTest(self, *args, **kwargs):
        with super().subTest(*args, **kwargs):
            try:
                yield
            except unittest.SkipTest as skip:
                self.reasons.append(str(skip))
                raise


def same_skips_as(twin):
    """Class decorator: what a test skips, it must also skip, in the same words, when it is run on `twin`."""

    def checked(name, test):
        @functools.wraps(test)
        def run(self, *args, **kwargs):
            skip = None
            try:
                test(self, *args, **kwargs)
            except unittest.SkipTest as exception:
                skip = exception
                self.reasons.append(str(skip))
            if self.reasons:
                result = unittest.TestResult()
                twin(name).run(result)
                expected = [_model_name(reason) for _, reason in result.skipped]
                assert [_model_name(reason) for reason in self.reasons] == expected, f"{twin.__name__}: {expected}"
            if skip is not None:
                raise skip

        return run

    def decorate(cls):
        for name in dir(cls):
            test = getattr(cls, name)
            # Decorators such as `require_torch_gpu` belong to the suite, not to a model: they skip for both.
            if name.startswith("test_") and callable(test) and not getattr(test, "__unittest_skip__", False):
                setattr(cls, name, checked(name, test))
        return cls

    return decorate


def _model_name(reason):
    """The reason without what names SNN-BERT or BERT in it."""
    return re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", reason).replace("SNNBert", "Bert")


def models(module, prefix):
    return tuple(getattr(module, prefix + head) for head in HEADS)


class _BertOfTransformers(ModelTesterMixin, SkipRecorder):
    """What `SNNBertModelTest` is compared with; pytest does not collect it on its own."""

    __test__ = False
    all_model_classes = models(transformers, "Bert")
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self.model_tester = ModelTester(self, transformers.BertConfig)


@same_skips_as(_BertOfTransformers)
class SNNBertModelTest(ModelTesterMixin, SkipRecorder):
    all_model_classes = models(modeling_snn_bert, "SNNBert")
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self.model_tester = ModelTester(self, SNNBertConfig)

    def test_spikes_flow(self):
        """With these settings and inputs, so that the suite does not compare one dead network with another."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            inputs = self._prepare_for_class(inputs, model_class)
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                rates = model(**inputs, output_firing_rates=True).firing_rates
            for name, rate in zip(model.neuron_names(), rates, strict=True):
                assert 0.01 < rate.mean() < 0.9, f"{model_class.__name__}: {name} fires at a rate of {rate.mean()}"


class SNNBertConfigTest(SkipRecorder):
    def test_config(self):
        ConfigTester(self, config_class=SNNBertConfig, hidden_size=36).run_common_tests()


def test_every_public_model_is_in_the_suite():
    public = {name for name in modeling_snn_bert.__all__ if re.fullmatch(r"SNNBert(Model|For\w+)", name)}
    assert public == {model.__name__ for model in SNNBertModelTest.all_model_classes}
