"""GPU: the decoder's step compiled once, and all steps of a frame as one CUDA graph.

A frame of a small model is hundreds of kernels of some microseconds each, which a host launches one
by one more slowly than the GPU runs them. A graph launches all of them at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from scd.common.runtime import cache_folder

Loop = Callable[..., Tensor]
"""From noisy patches [f n p], modulations [times r parts d] and per-step noise [steps f n p], which
may be of no steps, to clean patches."""

GRAPHS = 8
"""Graphs that are kept, one for each number of frames, schedule, solver and guidance scale."""


COMPILED_SHAPES = 64
"""Numbers of frames, joins and models that one process may compile; PyTorch's own limit is 8."""


class LoopGraph:
    """A loop captured on fixed memory: inputs are copied in, the output is copied out.

    Everything else that the loop reads, such as contexts in their rows, must stay where it was.
    """

    def __init__(self, loop: Loop, *inputs: Tensor) -> None:
        """Run the loop twice, as capturing demands, and capture it."""
        # The loop owns memory that the graph reads: it has to live as long.
        self.loop = loop
        self.inputs = tuple(one.clone() for one in inputs)
        device = inputs[0].device
        # Capturing happens on the current device, which need not be that of the tensors.
        with torch.cuda.device(device):
            side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(2):
                    loop(*self.inputs)
            here.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on to use the GPU while this one captures.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.clean = loop(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.clean.clone()


class LoopGraphs:
    """Graphs of loops by what they depend on, made when first needed."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self._graphs: dict[tuple, LoopGraph] = {}

    def run(
        self, key: tuple, loop: Loop, patches: Tensor, modulations: Tensor, step_noise: Tensor
    ) -> Tensor:
        """Run a loop through its graph; `key` names all that its arithmetic depends on."""
        if key not in self._graphs:
            if len(self._graphs) >= GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            start = time.perf_counter()
            self.report(
                f"preparing the denoising loop for {patches.shape[0]} frames side by side and "
                f"{modulations.shape[0]} steps: compiling and capturing; the compiled code is kept "
                "for later runs"
            )
            self._graphs[key] = LoopGraph(loop, patches, modulations, step_noise)
            torch.cuda.synchronize(patches.device)
            self.report(f"prepared in {time.perf_counter() - start:.1f} s")
        return self._graphs[key](patches, modulations, step_noise)

    def clear(self) -> None:
        """Forget all graphs, because memory that they read has moved."""
        self._graphs.clear()


def can_compile(device: torch.device) -> bool:
    """Whether a step is compiled unless told otherwise: on a GPU, where Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of fixed shapes; what is compiled is kept on disk between runs.

    A process may compile COMPILED_SHAPES of them, over all engines; the next is an error, not a
    silent fall back. `torch._dynamo.reset()` forgets them.
    """
    # The default place is a temporary folder, which a restart of the machine empties.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)
