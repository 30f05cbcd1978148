"""The levels of the instruction set at which this machine can run the compiled kernels; none without kernels."""

from modeling_snn_bert import cpu_kernels

CPU_LEVELS = cpu_kernels.levels_here()
