"""Players under DeepSpeed ZeRO 1, 2 and 3: one DeepSpeed engine each.

All parameters are in one group: a rank's fp32 masters are one flat partition, and DeepSpeed calls the
optimizer once per update, with the averaged gradient of that partition in place. A hook on this call does
what the other strategies do in their own step: penalties, norm, clipping, skipping. DeepSpeed's own clipping
stays off, and nothing here depends on how it stores gradients before the call.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.config import UserError
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.copying import lay_out, whole_copy
from pipeline.parallel.engine import Contribution, Engine, PlayerSettings, latent_of
from pipeline.parallel.fragments import Fragment, sum_of_squares
from pipeline.parallel.masters import make_optimizer, set_rates, start_momentum
from pipeline.parallel.order import Order, gathered_alone
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty
from pipeline.parallel.zero_settings import deepspeed_config, import_deepspeed, waiting_for

# DeepSpeed calls collectives by names that the newest torch has deprecated.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class ZeroEngine(Engine):
    """One player's DeepSpeed engine. The stages differ only in where the masters are."""

    copies = 1

    def __init__(self, module: nn.Module, player: PlayerSettings, ranks: Ranks, batch: BatchShape) -> None:
        super().__init__(module, player, ranks, batch)
        refuse_single_numbers(module)
        lay_out(module)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes = {name: p.shape for name, p in named.items()}
        twin = whole_copy(module).to("meta")  # has none of DeepSpeed's hooks: see _through_twin
        self._optimizer = make_optimizer(list(named.values()), player.optimizer)
        elements = sum(p.numel() for p in named.values())
        gc.freeze()  # `initialize` collects garbage several times, each 0.25 s for all that is there by now
        with waiting_for(ranks.timeout):
            self._ds, *_ = import_deepspeed(ranks.device).initialize(
                model=module,
                optimizer=self._optimizer,
                config=deepspeed_config(ranks.zero, ranks.precision, player.optimizer, batch, elements),
                dist_init_required=False,
            )
        self._ds.optimizer.torch_autocast_gradscaler = None  # the loss scale is the engine's own
        self._twin = _sharing_tensors(twin, module)
        self.order = Order(gathered_alone(module)) if self._stage == 3 else None
        self._flat, places = self._masters(named)
        start_momentum(self._optimizer, [self._flat])
        self._slices = [slice(offset, offset + count) for offset, _, count in places.values()]
        self.fragments = [
            Fragment(name, start, shapes[name], self._flat.detach()[part], player.penalised.get(name, 0.0))
            for (name, (_, start, _)), part in zip(places.items(), self._slices, strict=True)
        ]
        self.penalty = LocalPenalty.over(self.fragments, player.penalty)
        self._penalties: dict[str, torch.Tensor] = {}
        self._now: Rates | None = None  # that of the step under way
        self._last_round, self._hooked = True, False
        self._gathered: AbstractContextManager[Any] | None = None
        self._optimizer.register_step_pre_hook(self._before_optimizer)

    # Where the masters are

    def _masters(
        self, named: dict[str, nn.Parameter]
    ) -> tuple[torch.Tensor, dict[str, tuple[int, int, int]]]:
        """The flat partition, and for each parameter its part: (offset in it, first element, elements)."""
        zero = self._ds.optimizer
        groups = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        if len(groups) != 1:
            raise UserError(
                f"DeepSpeed divided {self.player.name} into {len(groups)} groups where ShardGAN "
                "needs one: leave sub_group_size out of the DeepSpeed config."
            )
        if self._stage < 3:
            return groups[0], {name: _mapped(p) for name, p in named.items()}
        places: dict[str, tuple[int, int, int]] = {}
        names, offset = {id(p): name for name, p in named.items()}, 0
        for p in zero.fp16_groups[0]:
            start = min(self.ranks.rank * p.partition_numel(), p.ds_numel)
            # Partitions are padded to equal length with uninitialised memory: stop before it.
            count = min(p.partition_numel(), p.ds_numel - start)
            places[names[id(p)]] = (offset, start, count)
            offset += p.partition_numel()
        return groups[0], {name: places[name] for name in named}

    @property
    def _stage(self) -> int:
        return int(self._ds.zero_optimization_stage())

    def masters_changed(self) -> None:
        zero = self._ds.optimizer
        if self._stage < 3:
            zero.update_lp_params()
        else:
            zero._reassign_or_swap_out_partitioned_parameters(0)
            self._masters_written()

    # Forward and backward

    def forward(self, *inputs: Any) -> torch.Tensor:
        if self.twice and self._stage == 3:
            return self._through_twin(*inputs)
        # DeepSpeed's wrapper cannot differentiate a pass twice.
        output: torch.Tensor = self.module(*inputs) if self.twice else self._ds(*inputs)
        return output

    def _through_twin(self, *inputs: Any) -> torch.Tensor:
        """Stage 3, a pass that is differentiated twice: gather the whole player until the last backward of
        the turn is done, and run it without hooks."""
        if self._gathered is None:
            zero = import_deepspeed(self.ranks.device).zero
            gathered: AbstractContextManager[Any] = zero.GatheredParameters(list(self.module.parameters()))
            gathered.__enter__()
            self._gathered = gathered
        self._ds.optimizer.clear_backward_seen_flag()  # or a round would overwrite the one before
        output: torch.Tensor = self._twin(*inputs)
        return output

    @property
    def latent(self) -> torch.Tensor:
        return latent_of(self._twin if self.twice and self._stage == 3 else self.module)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._last_round = last
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.doing("backward")
        self._ds.backward(self.scaled(loss))  # divides by the rounds itself
        if self._gathered is not None and self._last_round:
            self._gathered.__exit__(None, None, None)
            self._gathered = None
        if not self._last_round:
            self._ds.step()  # only counts the round

    def zero_grad(self) -> None:
        """DeepSpeed clears gradients in its step."""

    # The step

    def step(self, now: Rates) -> dict[str, Contribution]:
        self.doing("step")
        set_rates(self._optimizer, now)
        self._penalties, self._now = self.penalty.sums(), now
        self._hooked = False
        self._ds.step()
        self._forget_gradients()
        self._masters_written()
        if not self._hooked:  # stage 3, and any stage with offloading, skips a non-finite update itself
            self.skipping(torch.full_like(self._squares, torch.inf))
        return self.outcome(self._penalties, now)

    def _forget_gradients(self) -> None:
        """Stage 3, and any stage with offloading, keeps a parameter's gradient until there is another, and
        would apply it again in an update that the parameter takes no part in."""
        if self._stage == 3:
            self._ds.optimizer.grad_partitions_flat_buffer.zero_()
        if self._flat.grad is not None:  # with offloading
            self._flat.grad.zero_()

    def _masters_written(self) -> None:
        """Stage 3 gathers on its own stream, which waits for no other: on a GPU the next gather could read a
        partition that the optimizer is still writing. DeepSpeed's step has waited for the device anyway."""
        if self._stage == 3 and self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Called by the optimizer's step when the averaged gradient of the flat partition is in place."""
        gradient = self._flat.grad
        assert gradient is not None and self._now is not None
        if self.loss_scale is not None:
            self.loss_scale.down_([gradient])
        parts = [gradient[part] for part in self._slices]
        penalised = [p for p, f in zip(parts, self.fragments, strict=True) if f.penalised]
        self.penalty.add_gradient(penalised, self._now)
        squares = self.agreed(sum_of_squares(parts), self._penalties)
        self.clip([gradient], squares)
        optimizer.found_inf = self.skipping(squares).to(gradient.device)  # type: ignore[attr-defined]
        self._hooked = True

    # The rest

    def moments(self) -> list[dict[str, torch.Tensor]]:
        state = self._optimizer.state[self._flat]
        return [{k: t[part] if t.ndim else t.clone() for k, t in state.items()} for part in self._slices]

    def load_moments(self, states: list[dict[str, torch.Tensor]]) -> None:
        whole: dict[str, torch.Tensor] = {}
        for part, state in zip(self._slices, states, strict=True):
            for key, value in state.items():
                if key == "step":
                    whole[key] = value.to(self._flat.device)
                else:
                    flat = whole.setdefault(key, torch.zeros_like(self._flat, requires_grad=False))
                    flat[part] = value.to(flat.device).view(-1)
        self._optimizer.state[self._flat] = whole
        start_momentum(self._optimizer, [self._flat])


def _sharing_tensors(twin: nn.Module, module: nn.Module) -> nn.Module:
    """twin, a copy of the network, with its very parameters and buffers; also when a backward pass computes
    a checkpointed block again. Buffers are one dictionary, as a forward may replace them."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, own_name = name.rpartition(".")
        setattr(twin.get_submodule(owner), own_name, parameter)
    for name, layer in module.named_modules():
        twin.get_submodule(name)._buffers = layer._buffers
    return twin


def _mapped(p: Any) -> tuple[int, int, int]:
    """Stages 1 and 2: (offset in the flat partition, first element, elements) of a parameter's local part."""
    mapping = p._hp_mapping
    if mapping is None:
        return 0, 0, 0
    return (
        mapping.get_hp_fragment_address().start,
        mapping.lp_fragment_address.start,
        mapping.lp_fragment_address.numel,
    )


def refuse_single_numbers(module: nn.Module) -> None:
    """Raise UserError for a parameter without dimensions, whose bytes DeepSpeed cannot broadcast."""
    if single := [name for name, p in module.named_parameters() if not p.ndim]:
        raise UserError(
            f"The parameter {single[0]} of {type(module).__name__} is a single number, which "
            "DeepSpeed cannot send. Give it the shape [1], or train it under ddp."
        )
