"""A decoder whose products several devices compute together (mesh.tensor).

splits    how each linear layer is divided, and for which models that is
part      what of a model is one device's
"""
