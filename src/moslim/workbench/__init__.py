"""The embedded world: questions and answers whose preference levels a program can count exactly."""
