"""The feed-forward of a mixture of experts: router (which experts a token takes) → experts (through them, by tiles).

across is for devices of a mesh that have some of the experts each.
"""
