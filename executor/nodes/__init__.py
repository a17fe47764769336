"""Workers on several machines: the leader's side, the agents of the others, and what connects them."""
