"""The feed-forward of a mixture of experts: router (which experts a token takes) → experts (through them, by tiles), also
across devices that have some of the experts each."""
