"""What is served: one blueprint a subject. app.py is where one sees them all."""
