"""What several test files share: toys, tiny models and data sets, and programs that tests start as processes."""
