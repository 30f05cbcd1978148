"""Muon for the matrices that take spikes, beside AdamW for everything else.

Muon's step is the momentum of a matrix with its singular values moved towards 1, so that directions with small
gradients are learned as fast as those with large ones. Here, unlike in `torch.optim.Muon`,

- the step is relative: the learning rate is the share of their size by which it moves the weights of each input. All
  spikes are 1, so a column's size says what its spike stands for, and columns differ by more than ten times after
  `convert_bert`. The singular values are those of a matrix with equal columns.
- matrices of one shape go together, in a few products whatever their number.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Coefficients of a quintic that takes singular values from (0, 1] to about 1 when it is applied a few times.
QUINTIC = (3.4445, -4.7750, 2.0315)
# A column that is smaller than this share of the matrix counts as so large, so that it can grow again.
LEAST_COLUMN = 0.05


class MuonAdamW(torch.optim.Optimizer):
    """AdamW whose groups with `"muon": True`, of matrices only, are moved by Muon.

    The learning rate of such a group is relative (see above), and its weight decay decoupled, as AdamW's.

    Args:
        params: parameter groups, as for any torch optimiser.
        lr, betas, eps, weight_decay: for groups that do not say otherwise; Muon has no betas and eps.
        momentum: Muon's, in [0, 1); Nesterov's form.
        adamw: further options of `torch.optim.AdamW`, such as `fused`.

    Raises:
        ValueError: if `momentum` is outside its range, or a group with `"muon": True` holds anything but matrices, or
            one of zeros, which relative steps never move.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        **adamw: Any,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}")
        # Torch's AdamW checks them, and knows its defaults.
        known = torch.optim.AdamW([torch.zeros(())], lr, betas, eps, weight_decay, **adamw).defaults
        super().__init__(params, {**known, "momentum": momentum, "muon": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimiser.

        Raises:
            ValueError: if it is a group with `"muon": True` and holds anything but matrices, or one of zeros.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"] if group["muon"] else ():
            if parameter.dim() != 2 or not parameter.any():
                self.param_groups.pop()
                zeros = " of zeros" if parameter.dim() == 2 else ""
                raise ValueError(
                    f"Muon takes matrices that are not 0, got a parameter of shape {list(parameter.shape)}{zeros}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters; `closure`, if given, computes the gradients first, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = [group for group in self.param_groups if not group["muon"]]
        if others:
            # For this step; it works on our groups and our state.
            adamw = torch.optim.AdamW(others, **{name: others[0][name] for name in ("fused", "foreach")})
            adamw.state = self.state
            adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_of_muon(group)
        return loss

    def _step_of_muon(self, group: dict[str, Any]) -> None:
        alike: dict[tuple, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                kind = parameter.shape, parameter.device, parameter.dtype
                alike[kind].append((parameter, parameter.grad, state["momentum_buffer"]))
        for tensors in alike.values():
            parameters, grads, buffers = zip(*tensors, strict=True)
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            gradients = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
            steps = relative_steps(torch.stack(parameters), gradients)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, steps.unbind(), alpha=-group["lr"])


def relative_steps(matrices: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Muon's steps, each column of the size of the matrix's own.

    With `D` the root mean squares of the columns of a matrix (at least `LEAST_COLUMN` of the whole matrix's) as a
    diagonal, it is `V D`, and its step `orthogonalized(gradient D) D`, scaled to entries of the size of those of `D`.

    Args:
        matrices (`[number, rows, columns]`): the weights.
        gradients (the same shape): what to go against.
    """
    columns = matrices.square().mean(1, keepdim=True)
    whole = columns.mean(2, keepdim=True)
    sizes = columns.maximum(LEAST_COLUMN**2 * whole).sqrt()
    directions = orthogonalized(gradients * (sizes / whole.sqrt())).to(matrices.dtype)
    return directions * (math.sqrt(max(matrices.shape[1:])) * sizes)


def orthogonalized(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Matrices with the singular vectors of `matrices`, `[number, rows, columns]`, and singular values near 1.

    They come in bfloat16, which is enough for a step, where the device multiplies it fast, else in float32.
    """
    a, b, c = QUINTIC
    x = matrices.to(torch.bfloat16 if multiplies_bfloat16_fast(matrices.device) else torch.float32)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    # Not 0, which a matrix without a gradient would be divided by.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32; on a CPU without instructions for them they are not."""
    if device.type != "cpu":
        return True
    # Users cap what torch's products use, to see what a lesser processor does.
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in cap for name in ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")):
        return False
    # An older torch does not say what the CPU has.
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
