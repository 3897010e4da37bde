"""The engine: a network, its optimizer, and one optimizer step over this rank's share of a global batch.

One rank or many, the gradient of a step is that of the mean loss over the global batch: each rank adds its micro-batches up, and the ranks
exchange the sum once, in the last of them. Dropout is seeded from (seed, step, micro-batch, rank) before each micro-batch, so a resume
needs no generator's state, and a step is the same whatever came before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model.config import HardwareConfig
from model.digest import digest_of
from model.errors import UserError
from model.gpt2 import GPT2
from model.run_config import RunConfig
from model.stream.row_packing import IGNORED
from model.training.distributed import Ranks, placed_like, whole
from model.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate

_MEMORY_SHARE = 0.9
"""Of a GPU's free memory that an automatic micro-batch may take."""


class Engine:
    """One rank's engine. All ranks must call the same methods in the same order.

    Args:
        config: the run.
        hardware: how to compute it.
        device: this rank's own.
        ranks: who trains together.
        micro_batch: windows at once, where `hardware.micro_batch` is auto and an earlier process has tried it out; None: try it out.

    Raises:
        UserError: the settings do not go together.
    """

    def __init__(self, config: RunConfig, hardware: HardwareConfig, device: torch.device, ranks: Ranks, micro_batch: int | None) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        precision = config.training.precision
        self.autocast = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        self._sharded = hardware.strategy == "fsdp" and ranks.size > 1
        if self._sharded and config.training.optimizer == "muon":
            raise UserError("hardware.strategy: muon needs whole matrices; use ddp, or training.optimizer=adamw")
        torch.use_deterministic_algorithms(hardware.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.model = GPT2(config.model, seed=config.seed).to(device).train()
        if self._sharded:
            self._shard(hardware.compile)
        self.optimizer = build_optimizer(self.model, config.training)
        share = config.global_batch // ranks.size
        tried_out = micro_batch if hardware.micro_batch == "auto" else None
        self.micro_batch = min(share, tried_out or self._micro_batch(hardware, share))
        self._network: Any = self.model
        if ranks.size > 1 and not self._sharded:
            self._network = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if hardware.compile and not self._sharded:
            self._network = torch.compile(self._network)

    def _shard(self, compile_blocks: bool) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.autocast else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in self.model.h:
            if compile_blocks:
                block.compile()
            fully_shard(block, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        for method in ("hidden", "token_losses"):
            register_fsdp_forward_method(self.model, method)

    def accumulate(self, windows: Tensor, step: int, targets: int, rounds: int) -> tuple[float, float]:
        """Loss and gradient of a step: mean loss (nats a token) over the global batch, norm of its gradient before clipping.

        Args:
            windows: this rank's, uint16 [windows, max_length + 1], or of rows [windows, 2, max_length]; may be none.
            step: number of the step, from 0.
            targets: tokens of the global batch that are learned, over all ranks.
            rounds: micro-batches of the rank that has most. All ranks run as many: some of them none but for the exchange.
        """
        parts = list(windows.split(self.micro_batch)) if len(windows) else []
        total = torch.zeros((), device=self.device)
        for number in range(rounds):
            torch.manual_seed(int(digest_of([self.config.seed, step, number * self.ranks.size + self.ranks.rank])[:15], 16))
            empty = number >= len(parts)
            part = windows.new_zeros((1, *windows.shape[1:])) if empty else parts[number]
            with self._exchanging(number == rounds - 1):
                loss = self._loss(part) / targets
                (loss * (0 if empty else self.ranks.size)).backward()  # the exchange takes the mean over the ranks
            if not empty:
                total += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._norm = whole(norm)
        loss_value, norm_value = self.ranks.sum([total, self._norm if self.ranks.first else torch.zeros_like(self._norm)])
        return loss_value, norm_value

    def update(self, factor: float) -> None:
        """Clip the gradient and take the step, at `factor` times the peak learning rates."""
        if self.config.training.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.training.gradient_clip, self._norm)
        set_learning_rate(self.optimizer, factor)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, windows: Tensor) -> Tensor:
        wanted_N = None
        if windows.dim() == 3:
            wanted_N = (windows[:, 1].int() != IGNORED).flatten().nonzero()[:, 0].to(self.device, non_blocking=True)
        tokens_BT = windows.to(self.device, non_blocking=True).long()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            if wanted_N is not None:
                return self._network(tokens_BT[:, 0], tokens_BT[:, 1], wanted_N)
            return self._network(tokens_BT[:, :-1], tokens_BT[:, 1:])

    @contextlib.contextmanager
    def _exchanging(self, exchange: bool) -> Iterator[None]:
        """Gradients are exchanged among the ranks in the backward pass within, or only added up on each."""
        if self.ranks.size == 1:
            yield
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(exchange)
            yield
        else:
            network = getattr(self._network, "_orig_mod", self._network)
            with contextlib.nullcontext() if exchange else network.no_sync():
                yield

    def _micro_batch(self, hardware: HardwareConfig, share: int) -> int:
        if hardware.micro_batch is None:
            return self.config.training.batch_size
        if hardware.micro_batch != "auto":
            return hardware.micro_batch
        fits = self._fitting() if self.device.type == "cuda" else self.config.training.batch_size
        fits = max(1, min(share, *(found[0] for found in self.ranks.gather(fits))))
        return math.ceil(share / math.ceil(share / fits))  # micro-batches of about equal size

    def _fitting(self) -> int:
        """How many windows fit the GPU's memory at once, from the peaks with one and with two."""
        length = self.config.data.max_length
        windows = torch.zeros((2, length + 1) if self.config.windows == "text" else (2, 2, length), dtype=torch.uint16)
        self._network = self.model
        peaks = []
        for count in (1, 1, 2):  # the first one also makes what is made once
            torch.cuda.reset_peak_memory_stats(self.device)
            self._loss(windows[:count]).backward()
            peaks.append(torch.cuda.max_memory_allocated(self.device))
        self.discard()
        _, one, two = peaks
        weights = sum(_local(parameter).nbytes for parameter in self.model.parameters())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_allocated(self.device)
        exchanged = weights if self.ranks.size > 1 and not self._sharded else 0
        fixed = 2 * one - two + 2 * weights + exchanged  # AdamW's moments and DDP's buckets are not there yet
        return int((_MEMORY_SHARE * free - fixed) // max(1, two - one))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[GPT2]:
        """The network without dropout. All ranks must use it alike."""
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # only a backward pass does it by itself

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, where and as distributed as they are."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state by name, where and as distributed as it is."""
        return optimizer_state(self.model, self.optimizer)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take over weights, and the optimizer's state (empty: as at the beginning).

        Raises:
            ValueError: one is missing, unknown, or has another shape.
        """
        named = dict(self.model.named_parameters())
        if different := sorted(weights.keys() ^ named.keys()):
            raise ValueError(f"weights of another network: {', '.join(different[:3])}")
        for name, parameter in named.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"weights of another network: {name} is {list(weights[name].shape)}, not {list(parameter.shape)}")
            parameter.copy_(placed_like(weights[name], parameter))
        self.optimizer = build_optimizer(self.model, self.config.training)
        if state:
            load_optimizer_state(self.model, self.optimizer, state)

    def load_initial(self) -> None:
        """Begin anew."""
        self.load(dict(GPT2(self.config.model, seed=self.config.seed).named_parameters()), {})


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
