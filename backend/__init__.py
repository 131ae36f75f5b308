"""What turns a graph into something that runs. A backend may respell an operator; it never decides precision.

- `targets`: the GPUs that can be compiled for, what their tensor cores take, and who builds for them.
- `tensorrt`: engines by TensorRT and TensorRT-RTX, built in a child process (`tensorrt_worker`); `build_engine.sh`
  for targets that cannot be built here.
- `tensorrt_engine`: a plan on the GPU, by the runtime of either flavour; `cuda`: memory, stream and graphs.
- `inductor`: packages by AOTInductor, compiled in a child process (`inductor_worker`); `inductor_engine` and
  `torch_device`: the same at run time. `child`: a builder's process, its limits and its log.
- `onnxruntime`: reference and simulated runs on the CPU, through `lowering`, which spells out what
  onnxruntime lacks or computes in a wider format than the graph says.
- `torch_graph`: a rewritten graph as a torch module, by the table of `torch_operators`; `torch_fusion` finds what
  `torch_kernels` and, on a GPU, `triton_kernels` compute in one launch.
- `signature`: names, types and shapes of inputs and outputs, and the one check of what is fed to them.
- `gpu`: which CUDA devices this machine has.
"""
