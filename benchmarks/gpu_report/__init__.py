"""`make gpu-report OUT=DIR`: what this machine's device says about the models, on CUDA where there is one, else on the CPU."""
