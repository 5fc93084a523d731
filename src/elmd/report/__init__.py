"""`python -m elmd.report`: what experiments found, as one HTML page that people read and as files of tables."""
