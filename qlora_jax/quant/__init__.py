"""4-bit formats: codebooks (tables), blockwise (quantizing), tensor (QuantizedTensor), bitsandbytes and native (on
disk).
"""
