"""Users, their tokens, sessions and subscriptions."""
