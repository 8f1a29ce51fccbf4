"""The demo page as a Hugging Face Space, with the package in a folder beside this file."""

import os

from hf_budgetformer.tools.page import main


# Out of a Space, which has a network of its own, it is for this machine only.
host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
main(os.environ.get("CHECKPOINT", "checkpoint"), server_name=host)
