"""A tensor that keeps int8 numbers and scales, and knows few operations, as those of torchao do."""

import torch
from torch import nn

aten = torch.ops.aten


class QuantizedLike(torch.Tensor):
    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["numbers"], parts["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            spikes, weight, *bias = args
            return nn.functional.linear(spikes, weight.numbers.float() * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.clone.default):
            return cls(func(args[0].numbers), func(args[0].scale))
        raise NotImplementedError(f"{func} of {cls.__name__}")


def quantize_like(model, layers):
    """Give the Linears of `layers` weights of this kind, and plain ones of the same values to those of `model`."""
    for linear, plain in zip(layers, model, strict=True):
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(QuantizedLike(numbers, scale), requires_grad=False)
        plain.weight.data = numbers.float() * scale
