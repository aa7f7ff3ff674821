"""4-bit formats: codebooks (tables), blockwise (quantizing), tensor (QuantizedTensor), mxfp4 (read alone), bitsandbytes and native (on
disk).
"""
