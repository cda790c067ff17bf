"""Rewrites: what a traced block computes, in the form that its compiler makes fast.

Each changes a graph as torch.compile traced it, before a backend sees it.

| traced | becomes | numbers |
| ------ | ------- | ------- |
| the codes of one input, once for each layer that reads it | the same codes, once | the same |
| an RMS norm and a rotation of each query and key, and sequences joined | one kernel | up to rounding |
| a norm, its modulation, and e4m3 codes of the result | one kernel | up to rounding |
| GELU, columns beside it, and e4m3 codes of both | one kernel | up to rounding |
| a division by the step of the codes | a product with its reciprocal | up to rounding |
| an e4m3 product whose sums are kept in float32 | sums kept in the tensor cores | see below |

Kernels of ours and the last two are for GPUs. NVIDIA's tensor cores sum products of e4m3 with 14 bits
or so, which torch's products (and eager layers here) repair by adding to float32 sums on the way.
Compiled blocks leave them as they are, as torchao does by default (`use_fast_accum`). Measured on an
H200 against float64, before rounding to BF16 (which alone is 1.7e-3): relative L2 of 1.1e-3 for sums of
3,072 products of normal numbers, 3.0e-3 for 15,360; where all products have one sign the sums are too
small by 2 to 10 %. Quantizing to e4m3 costs 3.7e-2.
"""

from __future__ import annotations

from torch import fx

from quantmatrix.runtime.rewrites.activations import replace_activations
from quantmatrix.runtime.rewrites.codes import merge_equal, multiply_fast, quantize_fast
from quantmatrix.runtime.rewrites.norms import replace_norms
from quantmatrix.runtime.rewrites.rotations import replace_rotations


def rewrite(traced: fx.GraphModule, *, everywhere: bool = False) -> fx.GraphModule:
    """The module with all rewrites done in place; `everywhere` means without a GPU, too."""
    graph = traced.graph
    merge_equal(graph)
    replace_rotations(graph, everywhere=everywhere)
    replace_norms(graph, everywhere=everywhere)
    replace_activations(graph, everywhere=everywhere)
    quantize_fast(graph, everywhere=everywhere)
    multiply_fast(graph)
    traced.recompile()  # nodes without readers are the backend's to drop: it knows which write in place
    return traced
