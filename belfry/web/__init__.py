"""HTTP: authentication, rate limits, errors, the API document, gunicorn's worker class."""
