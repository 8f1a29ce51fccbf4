"""The page of the metric's Space."""

import evaluate
from evaluate.utils import launch_gradio_widget


if __name__ == "__main__":
    launch_gradio_widget(evaluate.load("budgetformer.py"))
