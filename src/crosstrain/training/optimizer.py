"""AdamW under a declared precision policy.

fp32: weights, gradients and moments in fp32. mixed: the model computes in bf16 with a copy of fp32 master weights; gradients
of every micro-batch are added up in fp32. bf16: weights and moments are bf16 themselves (small updates round away).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from crosstrain.value_head import VALUE_HEAD, named

Precision = Literal["fp32", "mixed", "bf16"]

MARK = "marked"
"""What the weights that movement is measured from are called among the moments."""


class Optimizer:
    """AdamW over a model's trainable parameters, and a value head's, holding the master weights where the policy asks for them.

    The head is trained in its own dtype, which is at least fp32, under every policy. After construction the model computes in the
    policy's dtype; `begin` sets AdamW's numbers.
    """

    def __init__(self, model: nn.Module, precision: Precision, value_head: nn.Linear | None = None) -> None:
        self.model = model
        self.precision = precision
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = dict(self.trainable)
        self._sums: dict[str, Tensor] = {}
        self._marks: dict[str, Tensor] = {}
        if precision == "mixed":
            self.masters = {name: p.detach().float().clone() for name, p in self.trainable.items()}
        if precision in ("mixed", "bf16"):
            cast_parameters(model, torch.bfloat16)
        if precision == "mixed":
            for name, p in self.trainable.items():
                p.register_post_accumulate_grad_hook(_add_to(self.masters[name], name, self._sums))
        self.masters |= named(value_head)
        self.begin()

    def begin(
        self,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        restart: bool = True,
        value_factor: float = 1.0,
    ) -> None:
        """Set AdamW's numbers for a stage; `restart` forgets the moments, otherwise they are kept. Marks are forgotten.

        value_factor: the value head's learning rate, as a multiple of the others'.
        """
        self._marks.clear()
        kept = {} if restart else self.moments()
        # as the HF Trainer does: matrices decay, biases and norm weights do not
        body = {name: m for name, m in self.masters.items() if not name.startswith(VALUE_HEAD)}
        decayed = [m for m in body.values() if m.ndim >= 2]
        rest = [m for m in body.values() if m.ndim < 2]
        head = [m for name, m in self.masters.items() if name not in body]
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "factor": 1.0},
            {"params": rest, "weight_decay": 0.0, "factor": 1.0},
            {"params": head, "weight_decay": weight_decay, "factor": value_factor},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
        self._load_moments(kept)

    def start_again(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from other weights, with fresh moments and the same numbers."""
        self.set_weights(weights)
        self.adamw.state.clear()

    def end(self) -> None:
        """Let go of gradients and moments: nothing is trained any more."""
        self.zero_grad()
        self._sums.clear()
        self.adamw.state.clear()
        self._marks.clear()

    @property
    def kept_bytes(self) -> int:
        """What gradients take while there are none."""
        return sum(kept.numel() * kept.element_size() for kept in self._sums.values())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in (*self.trainable.values(), *self.masters.values()):
            p.grad = None

    def freeze(self, frozen: Callable[[str], bool]) -> None:
        """Drop the gradients of parameters for which `frozen(name)` holds, so that this step leaves them alone."""
        for name, master in self.masters.items():
            if frozen(name):
                master.grad = None

    def clip(self, max_grad_norm: float) -> float:
        """Scale the gradient down to at most `max_grad_norm` (0: never) and return its norm before that."""
        params = [m for m in self.masters.values() if m.grad is not None]
        norm = nn.utils.get_total_norm([m.grad for m in params if m.grad is not None])
        if (size := float(norm)) > max_grad_norm > 0:  # else torch would multiply every gradient by 1
            nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
        return size

    def step(self, learning_rate: float) -> None:
        """One AdamW step at `learning_rate`, written back to the computing weights."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.adamw.step()
        self._write_back()
        self.zero_grad()

    @torch.no_grad()
    def _write_back(self) -> None:
        if self.precision == "mixed":
            torch._foreach_copy_(list(self.trainable.values()), [self.masters[name] for name in self.trainable])

    @property
    def marked(self) -> bool:
        """Whether there are weights to measure movement from."""
        return bool(self._marks)

    def mark(self) -> None:
        """Keep the weights as they are now, to measure movement from."""
        self._marks = {name: m.detach().clone() for name, m in self.masters.items()}

    def moved(self) -> dict[str, float]:
        """How far each parameter is from what `mark` kept: the root mean square over its entries."""
        return {
            name: float((m.detach() - self._marks[name]).float().square().mean().sqrt()) for name, m in self.masters.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """The trained weights at full precision, by parameter name."""
        return {name: m.detach() for name, m in self.masters.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state as `<parameter>/<quantity>` tensors, and what `mark` kept; empty before the first step."""
        names = {id(m): name for name, m in self.masters.items()}
        found = {
            f"{names[id(m)]}/{quantity}": value for m, state in self.adamw.state.items() for quantity, value in state.items()
        }
        return found | {f"{name}/{MARK}": value for name, value in self._marks.items()}

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Put back what `weights` and `moments` gave, exactly."""
        self.set_weights(weights)
        self.adamw.state.clear()
        self._marks.clear()
        self._load_moments(moments)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put other weights in place, moments untouched (a stage that starts from the base or the best)."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._write_back()

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        for key, value in moments.items():
            name, _, quantity = key.rpartition("/")
            master = self.masters[name]
            if quantity == MARK:
                self._marks[name] = value.to(master.device, copy=True)
            else:
                self.adamw.state[master][quantity] = value.to(master.device, copy=True)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, and nothing else: rotary frequencies are buffers that must stay fp32."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)


def _add_to(master: Tensor, name: str, sums: dict[str, Tensor]) -> Callable[[Tensor], None]:
    """What adds a parameter's gradient to its master's, in memory that is kept in `sums`: to get new memory from the system for
    every step takes longer than the sum.

    It must not know the optimizer, which knows the parameter: nothing would free that circle.
    """

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is not None:
            master.grad += parameter.grad
        elif master.device.type != "cpu":  # torch keeps a card's memory itself, for whoever needs it next
            master.grad = parameter.grad.float()
        else:
            if name not in sums:
                sums[name] = torch.empty_like(master)
            master.grad = sums[name].copy_(parameter.grad)
        parameter.grad = None

    return hook
