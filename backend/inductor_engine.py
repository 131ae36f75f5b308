"""A package of AOTInductor on the CPU or a GPU, with the weights of the graph beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05c.backend.torch_device import TorchCpu, TorchCuda
from pi05c.backend.torch_engine import TorchEngine
from pi05c.backend.torch_graph import TorchGraph
from pi05c.backend.torch_operators import to_numpy
from pi05c.graph.errors import Pi05cError

FINGERPRINT = "pi05c_constants"
"""Key of a package's metadata: the `fingerprint` of the module that it was compiled from."""

_SAMPLED_ELEMENTS = 64
_MESSAGE_CHARACTERS = 300


class InductorEngine(TorchEngine):
    """A loaded package, which takes its weights from the translated graph."""

    def __init__(
        self, model: Path, package: Path, device: TorchCpu | TorchCuda, module: TorchGraph | None = None
    ) -> None:
        """Load `package`, with the weights of the graph at `model`.

        Args:
            module: the translation of the graph on the device, where that is there already.

        Raises:
            Pi05cError: it does not load here, or was not compiled from that graph.
        """
        super().__init__(model, device, module)
        assert self.module is not None
        try:
            loaded = _loaded(package)
        except Exception as error:
            reason = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
            raise Pi05cError(
                f"{package} does not load with torch {torch.__version__} on {device.name} ({reason}): build it here "
                "with `pi05c build`"
            ) from error
        metadata = loaded.get_metadata()
        has = torch.backends.cpu.get_cpu_capability()
        if not device.on_gpu and "AVX512" in metadata.get("AOTI_CPU_ISA", "") and has != "AVX512":
            raise Pi05cError(
                f"{package} uses AVX512, and this CPU has {has}: build it here with `pi05c build`"
            )
        if metadata.get(FINGERPRINT) != fingerprint(self.module):
            raise Pi05cError(
                f"{package} was compiled from another graph than {model}, or by another pi05c: build it again with "
                "`pi05c build`"
            )
        weights = dict(self.module.named_buffers())
        names = loaded.get_constant_fqns()
        if own := [name for name in names if name not in weights]:
            raise Pi05cError(
                f"{package} needs {len(own)} constants that torch made while it compiled, such as {own[0]!r}, and does "
                "not hold them: build it with another version of torch, or for TensorRT"
            )
        taken = {name: weights[name] for name in names}
        loaded.load_constants(taken, check_full_update=True, user_managed=True)
        self._package: Any = loaded.loader

    def _call(self, given: list[Tensor]) -> Sequence[Tensor]:
        return self._package.boxed_run(given)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of package and weights."""
        self._package = None
        super().close()


def _loaded(package: Path) -> Any:
    """The package, without the synchronization of several threads, which cannot be captured in a CUDA graph.

    Not by `aoti_load_package`, which compiles test programs to find out what the CPU can do.
    """
    from torch.export.pt2_archive._package import AOTICompiledModel

    single_threaded, runners, any_device = True, 1, -1
    return AOTICompiledModel(
        torch._C._aoti.AOTIModelPackageLoader(str(package), "model", single_threaded, runners, any_device)
    )


def fingerprint(module: TorchGraph) -> str:
    """A hash of the names, types, shapes and some elements of the weights of a translated graph.

    A package takes its weights by names that the translation gives, so that another translation would be silently wrong.
    """
    digest = hashlib.sha256()
    for name, weight in module.named_buffers():
        flat = weight.reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(to_numpy(some.cpu()).tobytes())
    return digest.hexdigest()


__all__ = ["FINGERPRINT", "InductorEngine", "fingerprint"]
