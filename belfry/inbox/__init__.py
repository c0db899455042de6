"""List, count, mark as read and dismiss a user's notifications."""
