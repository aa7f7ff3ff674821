"""What io/peft reads and writes with: tensors (of a folder), experts (one adapter for all of a layer's)."""
