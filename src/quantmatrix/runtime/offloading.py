"""Offloading: transformer blocks wait in host memory and are on the device only while they run.

diffusers streams the blocks, with prefetch on a GPU. Where it uses a stream, version 0.42 gives
parameters their copies in host memory back after a block has run, and forgets the buffers of its
modules. Quantized layers keep their codes in buffers, so after one forward the whole model would lie
on the device; here the buffers go back, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def stream_blocks(transformer: Any, device: str) -> None:
    """Keep a diffusers transformer in host memory, and its blocks on the device while they run."""
    transformer.to("cpu")
    streams = device.startswith("cuda")
    transformer.enable_group_offload(
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
    )
    if streams:
        return_buffers(transformer)


def return_buffers(transformer: nn.Module) -> None:
    """Let the groups of an offloaded transformer give the memory of their buffers back, too."""
    groups = {}
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            groups[id(hook.group)] = hook.group
    for group in groups.values():
        group.offload_ = partial(offload_all, group, group.offload_)


def offload_all(group: Any, offload: Callable[[], None]) -> None:
    """Offload a group's parameters as diffusers does, then the buffers of its modules."""
    offload()
    for module in group.modules:
        for buffer in module.buffers():
            buffer.data = group.cpu_param_dict[buffer]
