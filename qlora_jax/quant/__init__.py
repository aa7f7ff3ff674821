"""4-bit formats: quantize, dequantize, and the interchange with bitsandbytes."""
