"""What a run needs to know of models that are no decoders alone: labels (an encoder with a head over classes), pair (an
encoder and a decoder)."""
