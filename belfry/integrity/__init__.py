"""Check that the stored data is consistent and follows the rules."""
