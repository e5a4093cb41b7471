"""Runs as a reader sees them: on the terminal, in TensorBoard, as tables, figures and a page."""
