"""Metrics for `evaluate`, each in a folder that `evaluate.load` takes and that can be published as a Space."""
