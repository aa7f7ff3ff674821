"""Models and adapters on disk and in stores.

folder (find, open), header and source (safetensors by byte ranges), remote (gs://, s3://), fingerprint → load
(stream and quantize) with fused (experts in one tensor), place (onto the device, piece by piece), peaks (what that
takes) → write (quantized folders), shards; peft_config → peft, with adapters/; merge; export.
"""
