"""Tools without a topic of their own."""
