"""The tests, as a package: each folder mirrors one of the project, and what they share is in `helpers`."""
