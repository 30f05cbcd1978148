"""The levels of the instruction set at which this machine can run the compiled kernels; none without kernels."""

from modeling_snn_bert import cpu_kernels

HIGHEST = cpu_kernels.highest_cpu_level()
CPU_LEVELS = cpu_kernels.CPU_LEVELS[: cpu_kernels.CPU_LEVELS.index(HIGHEST) + 1] if HIGHEST else ()
