"""Write, edit, read, render and explain messages."""
