"""Predicts from machine code how much of the memory bandwidth a CUDA kernel can reach: `tools/predict_cuda.py`."""
