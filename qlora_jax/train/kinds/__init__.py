"""What a run needs to know of models that are no decoders alone: pair (an encoder and a decoder)."""
