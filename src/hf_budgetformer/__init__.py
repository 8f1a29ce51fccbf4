"""BudgetFormer for Hugging Face Transformers: each input gets its own share of the work. Importing it registers it."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_budgetformer import BudgetFormerConfig
from .modeling_budgetformer import (
    BudgetFormerForSequenceClassification,
    BudgetFormerModel,
    BudgetFormerPreTrainedModel,
)
from .tools.prediction import BudgetTextClassificationPipeline
from .tools.training import BudgetCallback, add_teacher_logits


__version__ = "0.2.0"

AutoConfig.register(BudgetFormerConfig.model_type, BudgetFormerConfig, exist_ok=True)
AutoModel.register(BudgetFormerConfig, BudgetFormerModel, exist_ok=True)
AutoModelForSequenceClassification.register(BudgetFormerConfig, BudgetFormerForSequenceClassification, exist_ok=True)

# For `pipeline(...)(text, budget=0.25)`. Upstream's way to register warns, and saves the pipeline's code with a model.
PIPELINE_REGISTRY.supported_tasks["text-classification"] = {
    **PIPELINE_REGISTRY.supported_tasks["text-classification"],
    "impl": BudgetTextClassificationPipeline,
}

# A saved folder carries the code with it, for those who have not installed the package.
BudgetFormerConfig.register_for_auto_class()
BudgetFormerModel.register_for_auto_class("AutoModel")
BudgetFormerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "BudgetCallback",
    "BudgetFormerConfig",
    "BudgetFormerForSequenceClassification",
    "BudgetFormerModel",
    "BudgetFormerPreTrainedModel",
    "add_teacher_logits",
]
