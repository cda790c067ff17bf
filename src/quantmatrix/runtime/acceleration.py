"""Acceleration: the same forward with less waiting, by compiled blocks or by a CUDA graph.

*Compiled blocks* (`--compile`): diffusers' regional compilation of the repeated blocks, for fixed
shapes. The compiler fuses the quantization of an input into whatever made the input, after
`quantmatrix.runtime.rewrites` has rewritten what it would make slow.

*A CUDA graph* (`--cuda-graph`): a transformer's forward is captured once for every set of input
shapes, and replayed: Python no longer launches kernels, which is what a step waits for when its
matmuls are short. The same kernels run in the same order, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed, fx, nn
from torch.utils import _pytree as pytree

from quantmatrix.errors import UsageError
from quantmatrix.runtime.rewrites import rewrite

VARIANTS = 64
"""Shapes and kinds of block for which code may be compiled; dynamo's own limit is 8."""


def compile_blocks(
    transformer: nn.Module, *, backend: str | Callable[..., Any] = "inductor", **options: Any
) -> None:
    """Compile the repeated blocks of a diffusers transformer in place; `options` go to torch.

    `backend` is torch.compile's; it gets the rewritten graphs.

    Raises UsageError for a model that declares no repeated blocks.
    """
    if not getattr(transformer, "_repeated_blocks", None):
        raise UsageError(
            f"--compile: {type(transformer).__name__} declares no repeated blocks; leave it out"
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    compiled: Any = transformer
    rewritten = partial(compile_rewritten, backend)
    given = {"fullgraph": False, "dynamic": False, **options}
    compiled.compile_repeated_blocks(backend=rewritten, **given)


def compile_rewritten(
    backend: str | Callable[..., Any], traced: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """What a backend of torch.compile makes of a traced graph after our rewrites; `inputs` are example tensors."""
    compile_graph: Any = torch._dynamo.lookup_backend(backend)
    compiled: Callable[..., Any] = compile_graph(rewrite(traced), inputs)
    return compiled


def forget(transformer: nn.Module) -> None:
    """Let what was compiled or captured of a transformer be made again, with the layers that it has now.

    The compiler does not look again at the hooks of a layer, and a graph replays the kernels that it has.
    """
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        torch._dynamo.reset()
    free_graphs()


def free_graphs() -> None:
    """Free all graphs of this process; the next call of each shape captures one again.

    NCCL does not end as long as a graph has kernels of it.
    """
    for graphed in list(_graphed):
        graphed.graphs.clear()


class GraphedForward:
    """A module's forward, captured in one CUDA graph per set of input shapes.

    Arguments that are tensors must lie on the device: they are copied into the graph's own. Other
    arguments belong to the key. Outputs are copies, so a later call does not change them.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Take the forward as it is now; nothing is captured yet."""
        self.forward = forward
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}
        _graphed.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the graph of these shapes; capture it first when there is none."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if not tensor.is_cuda:
                raise UsageError(
                    "--cuda-graph: an argument of the transformer lies in host memory "
                    f"(shape {tuple(tensor.shape)}), so its forward cannot be captured"
                )
        shown = (
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in leaves
        )
        key = (str(spec), *shown)
        if key not in self.graphs:
            self.graphs[key] = self._capture(leaves, spec)
        graph, kept, output = self.graphs[key]
        for own, given in zip(kept, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, output)

    def _capture(self, leaves: list[Any], spec: Any) -> Any:
        owned = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(owned, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazy set-up, autotuning and compilation end here
                self.forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # processes that exchange tokens have a thread that looks at events of the device meanwhile
        mode = "thread_local" if distributed.is_initialized() else "global"
        with torch.cuda.graph(graph, capture_error_mode=mode):
            output = self.forward(*args, **kwargs)
        return graph, [leaf for leaf in owned if isinstance(leaf, torch.Tensor)], output


_graphed: WeakSet[GraphedForward] = WeakSet()
"""All of this process: a hook may stand in front of a transformer's forward, so it is not asked."""


def graph_forward(transformer: nn.Module) -> GraphedForward:
    """Replace a transformer's forward by its captured one; returns the replacement."""
    graphed = GraphedForward(transformer.forward)
    transformer.forward = graphed
    return graphed
