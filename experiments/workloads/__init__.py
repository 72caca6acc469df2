"""What is sent: models, sessions, traces."""
