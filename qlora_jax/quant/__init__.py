"""4-bit formats and int8: codebooks (tables), blockwise (quantizing), int8 (LLM.int8()), tensor (QuantizedTensor),
mxfp4 (read, never made), bitsandbytes and native (on disk).
"""
