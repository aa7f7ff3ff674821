"""A decoder whose products several devices compute together (mesh.tensor), or whose rows they share (mesh.sequence).

splits    how each linear layer is divided, and for which models that is
part      what of a model is one device's
tokens    attention of a device that has some of each row's tokens
"""
