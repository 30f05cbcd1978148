"""PEFT's adapters on SNN-BERT: which modules to adapt, and whether the neurons learn with them.

Importing this module tells PEFT, where it is installed, which modules of an SNN-BERT its methods adapt by default, so
`LoraConfig()` needs no `target_modules`. The package itself does not need PEFT.
"""

from typing import TYPE_CHECKING, Any, cast

from .layer_places import LINEARS, PLACES
from .modeling_snn_bert import SNNBertPreTrainedModel

if TYPE_CHECKING:
    import peft

# As PEFT has them for BERT.
DEFAULT_TARGETS = ("query", "value")
# Every Linear of the encoder, all of which take spikes. (A bare "dense" would be the pooler's and the masked LM's too.)
ENCODER_LINEARS = tuple(LINEARS)
# IA3 scales what these give out. It can scale what goes into a Linear as well, which would no longer be spikes.
IA3_TARGETS = ("key", "value", "output.dense")
NEURONS = tuple(dict.fromkeys(place.neuron.split(".")[-1] for place in PLACES))
# Modules that a fresh model has and that no adapter reaches.
HEADS = ("classifier", "qa_outputs", "pooler")


def adapter_settings(
    model: SNNBertPreTrainedModel, method: str = "lora", *, train_neurons: bool = True, train_head: bool = True
) -> dict[str, Any]:
    """Keyword arguments of PEFT's `LoraConfig` or `IA3Config` for `model`.

        LoraConfig(r=8, use_dora=True, **adapter_settings(model))

    Args:
        model: an SNN-BERT with any head.
        method: `"lora"` (DoRA is one of its settings) or `"ia3"`.
        train_neurons: train thresholds, decays and resets of the neurons, and save them with the adapter.
        train_head: train the classifier and the pooler (whichever there are) in full, and save them with the adapter.
            Leave it on unless the head is trained already; `LoraConfig(task_type=...)` alone leaves out the pooler.

    Raises:
        TypeError: if `model` is no SNN-BERT.
        ValueError: if `method` is not known.
    """
    if not isinstance(model, SNNBertPreTrainedModel):
        raise TypeError(f"`model` must be an SNN-BERT, got {type(model).__name__}")
    if method not in ("lora", "ia3"):
        raise ValueError(f"`method` must be 'lora' or 'ia3', got {method!r}")
    settings: dict[str, Any] = {"target_modules": list(ENCODER_LINEARS)}
    if method == "ia3":
        settings = {"target_modules": list(IA3_TARGETS), "feedforward_modules": []}
    modules = [name.split(".")[-1] for name, _ in model.named_modules()]
    wanted = (*(NEURONS if train_neurons else ()), *(HEADS if train_head else ()))
    settings["modules_to_save"] = [name for name in wanted if name in modules] or None
    return settings


def merge_adapters(model: "peft.PeftModel") -> SNNBertPreTrainedModel:
    """The SNN-BERT inside `model` with the active adapter in its weights, and nothing of PEFT left; in place.

    PEFT's own `merge_and_unload` does the same for LoRA, but for IA3 it stops at trained modules without a `weight`, as
    neurons are. The result's parameters are as they were for `requires_grad`.

    Raises:
        TypeError: if `model` is no `PeftModel` of an SNN-BERT.
        ImportError: if PEFT is not installed.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(model, PeftModel) or not isinstance(model.get_base_model(), SNNBertPreTrainedModel):
        raise TypeError(f"`model` must be a PeftModel of an SNN-BERT, got {type(model).__name__}")
    model.merge_adapter()
    merged = cast(SNNBertPreTrainedModel, model.get_base_model())
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            merged.set_submodule(name, module.modules_to_save[cast(str, module.active_adapter)])
        elif isinstance(module, BaseTunerLayer):
            merged.set_submodule(name, module.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def register_with_peft() -> bool:
    """Enter SNN-BERT in PEFT's tables of default target modules.

    Returns:
        Whether PEFT is installed.
    """
    try:
        from peft.utils import constants
    except ImportError:
        return False
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["snn_bert"] = list(DEFAULT_TARGETS)
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["snn_bert"] = list(IA3_TARGETS)
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["snn_bert"] = []
    return True


register_with_peft()

__all__ = ["adapter_settings", "merge_adapters", "register_with_peft"]
