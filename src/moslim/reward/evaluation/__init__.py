"""What the test stage finds out about a reward classifier: measures as pure functions, and the report made of them."""
