"""Serves a page that shows what a BudgetFormer checkpoint does with your texts; the same as `budgetformer page`.

    python examples/demo_page.py
    python examples/demo_page.py my-model --port 8000

Without a checkpoint it takes the one that `finetune_text_classification.py` saved. Needs the extra [page].
"""

import argparse

from hf_budgetformer.tools.page import main as serve


def main(argv: list[str] | None = None) -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo-output", help="folder or Hub id of a BudgetFormer")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args(argv)
    try:
        serve(args.checkpoint, server_name=args.host, server_port=args.port)
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
