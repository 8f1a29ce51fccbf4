"""BudgetFormer for Hugging Face Transformers: each input gets its own share of the work. Importing it registers it.

Where torch or transformers is not installed, only `hf_budgetformer.runtime` is of use: it serves what was exported.
"""

from importlib.util import find_spec
from typing import Any


__version__ = "0.2.0"

__all__ = [
    "BudgetCallback",
    "BudgetFormerConfig",
    "BudgetFormerForMultipleChoice",
    "BudgetFormerForQuestionAnswering",
    "BudgetFormerForSequenceClassification",
    "BudgetFormerForTokenClassification",
    "BudgetFormerModel",
    "BudgetFormerPreTrainedModel",
    "add_teacher_logits",
]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


_missing = [package for package in ("torch", "transformers") if not _is_installed(package)]

if _missing:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(
            f"hf_budgetformer.{name} needs {' and '.join(_missing)}: pip install {' '.join(_missing)}. Without them "
            "hf_budgetformer.runtime serves exported models."
        )

else:
    import transformers
    from transformers import AutoConfig, AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_budgetformer import BudgetFormerConfig
    from .modeling_budgetformer import (
        TASKS,
        BudgetFormerForMultipleChoice,
        BudgetFormerForQuestionAnswering,
        BudgetFormerForSequenceClassification,
        BudgetFormerForTokenClassification,
        BudgetFormerModel,
        BudgetFormerPreTrainedModel,
    )
    from .tools.prediction import BudgetTextClassificationPipeline
    from .tools.training import BudgetCallback, add_teacher_logits

    AutoConfig.register(BudgetFormerConfig.model_type, BudgetFormerConfig, exist_ok=True)
    AutoModel.register(BudgetFormerConfig, BudgetFormerModel, exist_ok=True)
    for _task in TASKS:
        _kind = globals()[f"BudgetFormerFor{_task}"]
        getattr(transformers, f"AutoModelFor{_task}").register(BudgetFormerConfig, _kind, exist_ok=True)
        _kind.register_for_auto_class(f"AutoModelFor{_task}")

    # For `pipeline(...)(text, budget=0.25)`. Upstream's way to register warns, and saves the pipeline's code with a
    # model.
    PIPELINE_REGISTRY.supported_tasks["text-classification"] = {
        **PIPELINE_REGISTRY.supported_tasks["text-classification"],
        "impl": BudgetTextClassificationPipeline,
    }

    # A saved folder carries the code with it, for those who have not installed the package.
    BudgetFormerConfig.register_for_auto_class()
    BudgetFormerModel.register_for_auto_class("AutoModel")
