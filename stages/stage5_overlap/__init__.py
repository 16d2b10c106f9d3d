"""Stage 5: CUDA graphs, fused kernels, and a step that launches the next batch before it reads this one."""
