"""The child process that compiles a package: `python -m pi05c.backend.inductor_worker REQUEST.json`.

Exit status: 0 compiled, 1 not compiled.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05c.backend.child import end_with_parent, memory_of, send
from pi05c.graph.errors import Pi05cError

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "always_keep_tensor_constants": True,
}
"""Weights stay out of the package; what launches the kernels, long and run once, is not optimized.

Constants keep their names. Otherwise Inductor turns one of no dimensions into a number, and where a kernel needs it in
memory, as `torch._scaled_mm` does its scales, into a constant of its own that nothing could fill at load
(`ExternKernel.realize_input`).
"""

_MESSAGE_CHARACTERS = 600


@dataclass(frozen=True)
class Request:
    """All that the compiler needs to know; paths are absolute or relative to the working folder.

    Attributes:
        device: `cuda`, the GPU at hand, or `cpu`.
        max_autotune: see `InductorOptions`.
    """

    model: str
    package: str
    device: str
    max_autotune: bool = False

    def to_json(self) -> str:
        """The request as `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote."""
        return cls(**json.loads(text))


def build(request: Request) -> None:
    """Compile the graph, write the package, load it and run it once.

    Raises:
        Pi05cError: an operator is outside the table, an input has no fixed shape, or the package does not load.
        Exception: of any kind, as Inductor raises it.
    """
    import torch

    from pi05c.backend.inductor_engine import FINGERPRINT, InductorEngine, fingerprint
    from pi05c.backend.signature import specs_of
    from pi05c.backend.torch_device import TorchCpu, TorchCuda
    from pi05c.backend.torch_graph import translate

    path = Path(request.model)
    _phase("translate")
    device = TorchCuda() if request.device == "cuda" else TorchCpu()
    module = translate(path, str(device.device))
    inputs = {spec.name: device.allocate(spec) for spec in specs_of(path)[0]}
    _phase("export")
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs.values()), strict=False)
        _phase("compile")
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=request.package,
            inductor_configs={
                **_OPTIONS,
                "max_autotune": request.max_autotune,
                "aot_inductor.metadata": {FINGERPRINT: fingerprint(module)},
            },
        )
    _phase("load and run")
    InductorEngine(path, Path(request.package), device, module).run(inputs)
    device.synchronize()
    send(event="built", version=torch.__version__, peak_memory=memory_of())


def _phase(name: str) -> None:
    send(event="progress", phase=name, step=0, steps=0)


def main(path: str) -> int:
    """Compile what the request file at `path` asks for; failures go to the log."""
    end_with_parent()
    request = Request.from_json(Path(path).read_text(encoding="utf-8"))
    try:
        build(request)
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, Pi05cError) else f"{type(error).__name__}: "
        print(f"[E] {kind}{' '.join(str(error).split())[:_MESSAGE_CHARACTERS]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
