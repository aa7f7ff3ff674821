"""4-bit formats: codebooks (tables), blockwise (quantizing), tensor (QuantizedTensor), mxfp4 (read, never made),
bitsandbytes and native (on disk).
"""
