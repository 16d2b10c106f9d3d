"""Kernels in Triton (Tillet et al. 2019): what a step does besides cuBLAS and the prefill's attention."""
