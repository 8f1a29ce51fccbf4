"""What a budget costs a classifier, as a metric."""
